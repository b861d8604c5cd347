"""`conserve bench replay` on emulated engines: the three policies, and everything that can be said wrongly."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from conserve_lab.cli import bench_main
from conserve_lab.live import trial
from conserve_lab.live.energy import DcgmMeter, EnergyUnknown, NvmlMeter, energy_meter
from conserve_lab.live.engines import NoEngines, named_engines
from conserve_lab.live.merge import merged, spreads
from conserve_lab.stack import LocalStack

SMALL = ["--trace", "service", "--conversations", "2", "--turns", "2", "--answer-tokens", "3", "--per-s", "50"]


@pytest.fixture(autouse=True)
def _no_idling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "IDLE_S", 0.01)


def test_three_policies_on_named_engines(fleet, tmp_path, capsys) -> None:
    target = tmp_path / "replay.json"
    engines = [part for engine in fleet.engines for part in ("--engine", f"{engine.role}={engine.url}")]
    argv = ["replay", *SMALL, *engines, "--preset", "paper", "--json", str(target)]
    assert bench_main(argv) == 0
    found = {each["policy"]: each for each in json.loads(target.read_text())}
    assert {name: each["prefill_requests"] for name, each in found.items()} == {
        "conserve": 2,  # once a conversation
        "per-turn": 4,  # once a turn
        "affinity": 0,
    }
    assert {name: each["transfers"] for name, each in found.items()} == {"conserve": 2, "per-turn": 4, "affinity": 0}
    assert all((each["turns"], each["failed_turns"]) == (4, 0) for each in found.values())
    assert all(each["energy"].startswith("not measured: ") for each in found.values())
    assert found["affinity"]["engines"] == "live: 3 do both"
    assert "energy not measured" in capsys.readouterr().out


def test_a_running_broker_brings_its_engines_and_a_dcgm_exporter_the_joules(tmp_path, dcgm_page) -> None:
    target = tmp_path / "replay.json"
    with LocalStack(preset="paper") as stack:
        argv = ["replay", *SMALL, "--broker", stack.broker_url, "--policy", "conserve", "--dcgm", dcgm_page]
        assert bench_main([*argv, "--repetitions", "2", "--json", str(target)]) == 0
    (found,) = json.loads(target.read_text())
    assert found["prefill_requests"] == 2
    assert found["spread"]["prefill_requests"] == {"n": 2, "min": 2, "p50": 2.0, "max": 2}
    assert found["joules"] == 3.0  # the page counts 1500 mJ for each GPU and question
    assert found["joules_per_output_token"] == round(3.0 / found["output_tokens"], 4)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "say which engines"),
        (["--engine", "http://127.0.0.1:9", "--broker", "http://127.0.0.1:9"], "say which engines"),
        (["--broker", "http://127.0.0.1:9"], "one --policy"),
        (["--broker", "http://127.0.0.1:9", "--policy", "conserve"], "no broker's fleet"),
        (["--engine", "chief=http://127.0.0.1:9"], "one of prefiller, decoder, both"),
        (["--engine", "http://127.0.0.1:9"], "no engine answers"),
    ],
)
def test_engines_that_cannot_be_used_are_a_usage_error(argv, says, capsys) -> None:
    assert bench_main(["replay", *argv]) == 2
    assert says in capsys.readouterr().err


def test_a_missing_environment_is_a_failure(tmp_path, capsys) -> None:
    assert bench_main(["replay", "--local-vllm", str(tmp_path)]) == 1
    assert "no vLLM in" in capsys.readouterr().err


def test_engines_of_two_models_are_refused(monkeypatch, fleet) -> None:
    models = iter([{"id": "a"}, {"id": "b"}])
    monkeypatch.setattr("conserve_lab.live.engines._model_of", lambda *_: next(models))
    with pytest.raises(NoEngines, match="different models"):
        named_engines([engine.url for engine in fleet.engines[:2]])


class TestEnergy:
    def test_an_exporter_that_tells_no_energy_is_named(self, fleet) -> None:
        with pytest.raises(EnergyUnknown, match="enable that field"):
            DcgmMeter([f"{fleet.engine('d0').url}/metrics"])

    def test_an_exporter_that_is_asked_for_must_answer(self, fleet, capsys) -> None:
        argv = ["replay", "--engine", fleet.engine("d0").url, "--dcgm", "http://127.0.0.1:9/metrics"]
        assert bench_main(argv) == 1
        assert "does not answer" in capsys.readouterr().err

    def test_nvml_counts_all_gpus_in_joules(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", _nvml(millijoules=[2_500, 500]))
        assert energy_meter(()).joules() == 3.0

    @pytest.mark.parametrize(("millijoules", "says"), [([], "no GPU here"), (None, "counts energy")])
    def test_a_machine_without_a_gpu_says_so(self, monkeypatch, millijoules, says) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", _nvml(millijoules=millijoules))
        with pytest.raises(EnergyUnknown, match=says):
            NvmlMeter()

    def test_without_the_binding_the_extra_is_named(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        with pytest.raises(EnergyUnknown, match=r"conserve-sdk\[energy\]"):
            NvmlMeter()


def test_repetitions_become_medians_and_spreads() -> None:
    repetitions = [
        {"a": 1, "b": {"c": 1.5, "d": None}},
        {"a": 3, "b": {"c": 2.5, "d": 1}},
        {"a": 2, "b": {"c": 9, "d": 1}},
    ]
    assert merged(repetitions) == {"a": 2, "b": {"c": 2.5, "d": None}}
    assert spreads(repetitions) == {
        "a": {"n": 3, "min": 1, "p50": 2, "max": 3},
        "b.c": {"n": 3, "min": 1.5, "p50": 2.5, "max": 9},
    }


def _nvml(*, millijoules: list[int] | None) -> SimpleNamespace:
    """NVML of a machine with these GPUs; None: of one whose driver is missing."""

    class NVMLError(Exception):
        pass

    def init() -> None:
        if millijoules is None:
            raise NVMLError("driver not loaded")

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlDeviceGetCount=lambda: len(millijoules or []),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda index: (millijoules or [])[index],
    )


@pytest.fixture
def dcgm_page() -> Iterator[str]:
    """A DCGM exporter of two GPUs, each of which uses 1.5 J from one question to the next."""
    asked = [0]

    class Exporter(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[0] += 1
            name = "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"
            lines = [f'{name}{{gpu="{gpu}",UUID="GPU-{gpu}"}} {asked[0] * 1500}' for gpu in range(2)]
            page = "\n".join([f"# TYPE {name} counter", *lines, ""]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Exporter) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()
        thread.join()

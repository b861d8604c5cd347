"""The fleet, the launcher and the fork server for real; only vLLM itself is stood in for by a few lines of HTTP.

The stand-in has the modules that the fork server imports, so what is tested is who starts, watches and kills what.
"""

import os
import signal
import sys
import time
from pathlib import Path

import httpx2
import pytest

from conserve_broker.settings import BrokerConfig
from conserve_lab.vllm import FleetOptions, VllmEngineDiedError, VllmFleet, VllmStartError
from conserve_lab.vllm._model import make_model
from conserve_lab.vllm.install import plan_install

BUDGET_S = 30.0

MODULES = """vllm vllm.entrypoints vllm.entrypoints.launchers vllm.entrypoints.launchers.api_server vllm.utils
    vllm.utils.system_utils vllm.v1 vllm.v1.engine vllm.v1.engine.async_llm vllm.v1.engine.core
    vllm.v1.engine.coordinator vllm.v1.engine.utils vllm.v1.executor vllm.v1.executor.uniproc_executor vllm.v1.worker
    vllm.v1.worker.cpu_worker vllm.v1.worker.cpu_model_runner vllm.v1.attention vllm.v1.attention.backends
    vllm.v1.attention.backends.cpu_attn vllm.model_executor vllm.model_executor.models
    vllm.model_executor.models.llama vllm.model_executor.models.registry vllm.distributed
    vllm.distributed.kv_transfer vllm.distributed.kv_transfer.kv_connector
    vllm.distributed.kv_transfer.kv_connector.v1 vllm.distributed.kv_transfer.kv_connector.v1.nixl
    xgrammar nixl_cu13 nixl_cu13._api""".split()  # noqa: SIM905

SOURCES = {
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl": "class NixlPullConnector: pass\n",
    "nixl_cu13._api": """
class nixlBind:
    class nixlAgentConfig:
        pass
""",
    "vllm.entrypoints.launchers.api_server.entry": '''
import argparse, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import nixl_cu13._api, vllm.v1.engine.utils

parser = argparse.ArgumentParser()
for name in ("--port", "--model", "--kv-cache-memory-bytes"):
    parser.add_argument(name)

PAGE = """vllm:cache_config_info{{block_size="32",num_gpu_blocks="{blocks}"}} 1.0
vllm:generation_tokens_total{{engine="0"}} {pid}
"""

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        blocks = int(options.kv_cache_memory_bytes) // 512 // 32
        body = PAGE.format(blocks=blocks, pid=os.getpid()).encode() if self.path == "/metrics" else b""
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

def main():
    global options
    options, _ = parser.parse_known_args()
    orders = Path(options.model, "orders").read_text() if Path(options.model, "orders").exists() else ""
    config = nixl_cu13._api.nixlBind.nixlAgentConfig()
    config.pthrDelay = 0
    config.useProgThread = True
    start = vllm.v1.engine.utils.get_mp_context().get_start_method()
    print("delay", config.pthrDelay, "thread", config.useProgThread, "start", start, flush=True)
    print("channel", os.environ.get("VLLM_NIXL_SIDE_CHANNEL_PORT", "none"), flush=True)
    if orders == "fail":
        raise ValueError("no such model")
    if orders == "exit":
        sys.exit(3)
    core = os.fork()
    if core == 0:
        time.sleep(600)
    print("core", core, flush=True)
    if orders == "hang":
        time.sleep(600)
    server = ThreadingHTTPServer(("127.0.0.1", int(options.port)), Handler)
    server.serve_forever()
''',
}


@pytest.fixture
def place(tmp_path):
    """An environment whose Python knows the stand-in, stamped as installed."""
    site = tmp_path / "site"
    for module in {*MODULES, *SOURCES}:
        parts = module.split(".")
        is_package = any(other.startswith(f"{module}.") for other in {*MODULES, *SOURCES})
        path = site.joinpath(*parts, "__init__.py") if is_package else site.joinpath(*parts).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCES.get(module, ""))
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f"""#!/bin/sh
case "$*" in *tiny_model.py*) echo '{{"eos_token_id": 7}}' > "$4/config.json"; exit ;; esac
[ -e {tmp_path}/broken ] && exit 1
PYTHONPATH="$PYTHONPATH:{site}" exec {sys.executable} "$@"
""")
    python.chmod(0o755)
    plan = plan_install(venv)
    plan.stamp.write_text(plan.digest)
    return tmp_path


@pytest.fixture
def make_fleet(place):
    def make(*, orders="", **options):
        shape = FleetOptions().shape
        model = make_model(shape, python=place / "venv" / "bin" / "python", cache=place / "cache")
        (model / "orders").write_text(orders)
        return VllmFleet(
            FleetOptions(**{"start_budget_s": BUDGET_S} | options),
            venv=place / "venv",
            cache=place / "cache",
            logs=place / "logs",
        )

    return make


def is_running(pid):
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid):
    deadline = time.monotonic() + BUDGET_S
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def core_of(fleet, engine_id):
    """The engine core that the stand-in forked last."""
    return int(fleet.logs(engine_id).rsplit("core ", 1)[1].split()[0])


def test_engines_are_known_by_what_they_say(make_fleet):
    with make_fleet(hosts=1, references=1) as fleet:
        assert list(fleet.engines) == ["p0", "d0", "d1", "b0", "a0"]
        reference = fleet.engines["a0"]
        assert (reference.role, reference.connector, reference.transfer_group) == ("both", None, "")
        assert {engine.kv_capacity_tokens for engine in fleet.engines.values()} == {131_072}
        assert len({engine.url for engine in fleet.engines.values()}) == 5
        assert reference.api == f"{reference.url}/v1"
        assert (fleet.model, fleet.eos_token_id, fleet.kv_bytes_per_token) == ("conserve-tiny", 7, 512)
        assert [entry["id"] for entry in fleet.broker_engines()] == ["p0", "d0", "d1", "b0"]
        assert len(fleet.broker_engines(references=True)) == 5
        pids = [engine.pid for engine in fleet.engines.values()]
    assert not any(is_running(pid) for pid in pids)


def test_a_broker_takes_the_engines_as_they_are_listed(make_fleet):
    with make_fleet(references=1, hold_ms=12_000) as fleet:
        listed = fleet.broker_engines(references=True)
    config = BrokerConfig.model_validate({"engine": listed})
    told = {spec.engine_id: spec for spec in config.engine_configs()}
    assert list(told) == ["p0", "d0", "d1", "a0"]
    assert [spec.max_hold_ms for spec in told.values()] == [30_000, 12_000, 12_000, 0]
    assert [spec.transfer_group for spec in told.values()] == ["nixl", "nixl", "nixl", ""]


def test_servers_fork_and_nixl_rests(make_fleet):
    with make_fleet(decoders=1, references=1) as fleet:
        assert "delay 1000 thread True start fork" in fleet.logs("d0")
        assert f"channel {int(fleet.engines['d0'].url.rsplit(':', 1)[1]) + 1}" in fleet.logs("d0")
        assert "channel none" in fleet.logs("a0")


def test_a_killed_engine_takes_its_core_with_it(make_fleet):
    with make_fleet(decoders=1) as fleet:
        core = core_of(fleet, "d0")
        assert is_running(core)
        fleet.kill("d0")
        wait_gone(core)
        assert not fleet.is_alive("d0")
        assert fleet.is_alive("p0")
        with pytest.raises(httpx2.TransportError):
            fleet.metrics("d0")
        fleet.kill("d0")  # again: nothing to do


def test_a_restarted_engine_is_another_process_at_the_same_place(make_fleet):
    with make_fleet(decoders=1) as fleet:
        old = fleet.engines["d0"]
        new = fleet.restart("d0")
        assert new == fleet.engines["d0"]
        assert (new.url, new.pid == old.pid) == (old.url, False)
        assert fleet.metrics("d0").generation_tokens == new.pid
        assert fleet.logs("d0").count("core ") == 2


def test_an_engine_that_dies_is_noticed_and_its_core_buried(make_fleet):
    with make_fleet(decoders=1) as fleet:
        core = core_of(fleet, "d0")
        assert not fleet.wait_dead("d0", timeout_s=0)
        os.kill(fleet.engines["d0"].pid, signal.SIGTERM)
        assert fleet.wait_dead("d0", timeout_s=BUDGET_S)
        wait_gone(core)


def test_servers_end_with_the_process_that_started_them(make_fleet):
    with make_fleet(decoders=1) as fleet:
        pids = [fleet.engines["p0"].pid, core_of(fleet, "p0"), fleet.engines["d0"].pid, core_of(fleet, "d0")]
        assert all(is_running(pid) for pid in pids)
        launcher = fleet._launcher._server
        launcher.kill()
        for pid in pids:
            wait_gone(pid)
        with pytest.raises(VllmStartError, match="launcher"):
            fleet.restart("d0")


@pytest.mark.parametrize(
    ("orders", "message"),
    [("fail", "ended with code 1 while starting: .*ValueError: no such model"), ("exit", "ended with code 3")],
)
def test_an_engine_that_ends_while_starting_shows_its_log(make_fleet, place, orders, message):
    with pytest.raises(VllmEngineDiedError, match=message):
        make_fleet(orders=orders, decoders=0).__enter__()
    assert (place / "logs" / "p0.log").exists()


def test_an_engine_that_never_answers_runs_into_the_budget(make_fleet, place):
    fleet = make_fleet(orders="hang", decoders=0, start_budget_s=5.0)
    with pytest.raises(VllmStartError, match=r"p0 is not healthy after 5 s: .*core"):
        fleet.__enter__()
    wait_gone(core_of(fleet, "p0"))


def test_a_python_that_cannot_import_vllm_is_named(make_fleet, place):
    fleet = make_fleet(decoders=0)
    (place / "broken").touch()
    with pytest.raises(VllmStartError, match=r"vLLM could not be imported within 30 s; read .*launcher\.log"):
        fleet.__enter__()


def test_an_unknown_engine_is_named_with_those_that_exist(make_fleet):
    with make_fleet(decoders=1) as fleet, pytest.raises(VllmStartError, match=r"no engine 'd7'.*there are p0, d0"):
        fleet.kill("d7")


@pytest.mark.parametrize("fails", [False, True], ids=["well", "failed"])
def test_logs_stay_only_where_something_failed(place, fails):
    said = []
    fleet = VllmFleet(FleetOptions(decoders=0), venv=place / "venv", cache=place / "cache", say=said.append)
    with pytest.raises(ZeroDivisionError) if fails else fleet:
        if fails:
            with fleet:
                raise ZeroDivisionError
    assert fleet.logs_directory.exists() is fails
    assert "p0 is healthy" in said
    if fails:
        assert said[-1] == f"logs are in {fleet.logs_directory}"
        assert "core" in fleet.logs("p0")

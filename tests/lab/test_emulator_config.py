"""Fleet files, their errors, and the command that serves them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from conserve_lab.emulator import (
    EmulatorConfig,
    FleetConfigError,
    default_fleet,
    emulate_main,
    fleet_of,
    load_fleet_config,
)

FLEET = """
[defaults]
model = "tiny"
time_scale = 0

[[engine]]
id = "p0"
role = "prefiller"

[[engine]]
id = "d0"
role = "decoder"
block_size = 32
"""


def test_a_fleet_file_with_defaults(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    fleet = load_fleet_config(path)
    assert [(engine.id, engine.role, engine.model, engine.block_size) for engine in fleet.engine] == [
        ("p0", "prefiller", "tiny", 16),
        ("d0", "decoder", "tiny", 32),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[engine]]\nid = 'a'\nspeed = 3", r"engine\[0\].speed: unknown key; known keys are answer_tokens_max"),
        ("[[engine]]\nrole = 'decoder'", r"engine\[0\].id: missing; add this key"),
        ("[[engine]]\nid = 'a'\nrole = 'boss'", r"engine\[0\].role: .*'prefiller'"),
        ("[[engine]]\nid = 'a'\nport = 99999", r"engine\[0\].port: .*65535"),
        ("[[engine]]\nid = 'a b'", r"engine\[0\].id: .*pattern"),
        ("[[engine]]\nid = 'a'\n[[engine]]\nid = 'a'", "engine: id 'a' is used by two engines|id 'a' is used by two"),
        ("[[engine]]\nid = 'a'\nport = 81\n[[engine]]\nid = 'b'\nport = 81", "port 81 is used by two engines"),
        ("[[engine]]\nid = 'a'\nkv_cache_tokens = 10", "raise kv_cache_tokens or lower max_model_len"),
        ("[[engine]]\nid = 'a'\ntool_calls_min = 12", "tool_calls_min is larger than tool_calls_max"),
        ("", "engine: no engines; add at least one"),
        ("[fleet]\na = 1", "unknown key fleet; use"),
        ("defaults = 3", "is one table"),
        ("engine = [3]", r"engine\[0\]: Input should be"),
        ("x = ", "not valid TOML"),
    ],
)
def test_wrong_fleet_files_name_key_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(FleetConfigError, match=message) as caught:
        load_fleet_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FleetConfigError, match=r"none\.toml: No such file"):
        load_fleet_config(tmp_path / "none.toml")


def test_the_default_fleet_and_changes_to_all() -> None:
    fleet = default_fleet()
    assert [engine.id for engine in fleet.engine] == ["p0", "p1", "d0", "d1", "d2"]
    assert {engine.time_scale for engine in fleet.with_all(time_scale=0.5).engine} == {0.5}
    with pytest.raises(FleetConfigError, match="unknown key"):
        fleet.with_all(speed=1)
    assert fleet_of([{"id": "a"}], defaults={"model": "m"}).engine[0].model == "m"


def test_time_scale_shortens_everything_but_the_lease() -> None:
    config = EmulatorConfig(id="a", time_scale=0.5)
    slow, fast = config.engine_model(), EmulatorConfig(id="a", time_scale=0).engine_model()
    assert slow.cost.step_us(decodes=1, context_tokens=0, prefill_tokens=0) == 9_050
    assert slow.cost.step_us(decodes=0, context_tokens=0, prefill_tokens=2000) == 9_000 + 50_000
    assert slow.kv_lease_us == fast.kv_lease_us == 30_000_000
    assert fast.cost.step_us(decodes=3, context_tokens=10**6, prefill_tokens=10**5) == 0
    instant = EmulatorConfig(id="a", time_scale=0).transfer_cost()
    assert instant.transfer_us(30_000) == 0


def test_check_and_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    assert emulate_main(["--check", "--prefillers", "1", "--decoders", "2"], out=out) == 0
    assert out.getvalue() == "ok: 3 engines\n"
    assert emulate_main(["--config", str(tmp_path / "none.toml")]) == 2
    assert "name an existing TOML file" in capsys.readouterr().err
    assert emulate_main(["--prefillers", "0", "--decoders", "0"]) == 2


def test_the_command_serves_until_told(http: httpx2.Client) -> None:
    out, stop = io.StringIO(), threading.Event()
    served: list[int] = []
    arguments = ["--decoders", "1", "--prefillers", "1", "--time-scale", "0", "--json"]
    thread = threading.Thread(target=lambda: served.append(emulate_main(arguments, out=out, until=stop)))
    thread.start()
    deadline = time.monotonic() + 30
    while not out.getvalue().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    engines = json.loads(out.getvalue())["engines"]
    assert [http.get(engine["url"] + "/health").status_code for engine in engines] == [200, 200]
    stop.set()
    thread.join(30)
    assert served == [0]


def test_a_taken_port_ends_the_command_with_a_remedy(
    tmp_path: Path, http: httpx2.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    with socket.socket() as blocker:
        blocker.bind(("127.0.0.1", 0))
        blocker.listen()
        path = tmp_path / "fleet.toml"
        path.write_text(f"[[engine]]\nid = 'a'\nport = {blocker.getsockname()[1]}")
        assert emulate_main(["--config", str(path)]) == 1
    assert "choose other ports or 0" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_process_cleanly(number: signal.Signals) -> None:
    code = "import sys; from conserve_lab.emulator import emulate_main; sys.exit(emulate_main(['--decoders', '1']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[0].split()[:3] == ["p0", "prefiller", "emulated"]
        assert lines[3] == "Press Ctrl-C to stop.\n"
        os.kill(process.pid, number)
        assert process.wait(30) == 0

"""`conserve demo` as its users start it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

CONSERVE = Path(sys.executable).with_name("conserve")


@pytest.mark.timeout(120)
def test_demo_in_a_pipe(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    done = subprocess.run(
        [CONSERVE, "demo", "--conversations", "3", "--time-scale", "0", "--no-compare", "--json", out],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b[" not in done.stdout, "no terminal codes in a pipe"
    assert json.loads(out.read_text("utf-8"))["conversations"] == 3


@pytest.mark.timeout(120)
def test_serve_ends_well_on_a_signal() -> None:
    command = [CONSERVE, "demo", "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(line.split()[1] for line in process.stdout if line.startswith("broker"))
        with httpx2.Client(trust_env=False, timeout=10) as client:
            engines = client.get(f"{url}/v1/fleet").json()["engines"]
        assert [engine["engine_id"] for engine in engines] == ["d0", "d1", "d2", "p0", "p1"]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == ""

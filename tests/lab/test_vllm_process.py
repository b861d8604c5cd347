"""Commands, ports and the model's directory: the small parts under the fleet."""

import os
import socket
import sys
import threading

import pytest

from conserve_lab.ports import FIRST, LAST, NoPortError, free_ports, wait_free
from conserve_lab.vllm import ModelShape, VllmStartError
from conserve_lab.vllm._model import _publish, eos_token_id, make_model
from conserve_lab.vllm._process import CommandFailedError, stream

PYTHON = sys.executable


def test_lines_of_both_streams_come_without_newlines():
    script = "import sys; print('out', flush=True); print('err', file=sys.stderr)"
    assert list(stream([PYTHON, "-c", script])) == ["out", "err"]


def test_a_failure_carries_code_and_last_lines():
    script = "[print(f'line {number}') for number in range(9)]; raise SystemExit(4)"
    with pytest.raises(CommandFailedError, match=r"^exit code 4: line 6 \| line 7 \| line 8$"):
        list(stream([PYTHON, "-c", script]))


def test_a_silent_failure_says_so():
    with pytest.raises(CommandFailedError, match="exit code 1: no output"):
        list(stream([PYTHON, "-c", "raise SystemExit(1)"]))


def test_a_missing_program_is_named():
    with pytest.raises(CommandFailedError, match="/no/such/program: No such file"):
        list(stream(["/no/such/program"]))


def test_an_abandoned_command_is_killed():
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    lines = stream([PYTHON, "-c", script])
    pid = int(next(lines))
    lines.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_ports_differ_and_are_free_and_not_ephemeral():
    ports = free_ports(8)
    assert len(set(ports)) == 8
    assert all(FIRST <= port < LAST for port in ports)
    assert not set(ports) & set(free_ports(8))  # those found first may not be listened on yet


def test_a_port_in_use_is_left_out():
    (taken,) = free_ports(1)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", taken))
        listener.listen()
        assert taken not in free_ports(4)


def test_too_many_ports_are_refused():
    with pytest.raises(NoPortError, match="no 20000 free ports"):
        free_ports(20_000)


@pytest.fixture
def model_python(tmp_path):
    """A Python that makes no model but leaves the file we read, and fails the second time."""
    program = tmp_path / "python"
    body = """
        [ -e "$(dirname "$0")/used" ] && { echo no torch here; exit 1; }
        touch "$(dirname "$0")/used"; echo '{"eos_token_id": 2}' > "$4/config.json"
    """
    program.write_text(f"#!/bin/sh\n{body}")
    program.chmod(0o755)
    return program


def test_a_model_is_made_once_for_each_shape(tmp_path, model_python):
    first = make_model(ModelShape(), python=model_python, cache=tmp_path)
    assert make_model(ModelShape(), python=model_python, cache=tmp_path) == first
    assert eos_token_id(first) == 2
    with pytest.raises(VllmStartError, match="could not make the tiny model: exit code 1: no torch here"):
        make_model(ModelShape(seed=1), python=model_python, cache=tmp_path)


def test_a_failed_draft_leaves_nothing_behind(tmp_path, model_python):
    (tmp_path / "used").touch()
    with pytest.raises(VllmStartError):
        make_model(ModelShape(), python=model_python, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_makers_of_the_same_model_agree(tmp_path, model_python):
    home = make_model(ModelShape(), python=model_python, cache=tmp_path)
    late = tmp_path / "late"
    late.mkdir()
    _publish(late, home)
    assert eos_token_id(home) == 2
    with pytest.raises(OSError, match="No such file"):
        _publish(late, tmp_path / "nowhere" / "home")


def test_the_kv_of_a_token_follows_from_the_shape():
    assert ModelShape().kv_bytes_per_token == 512
    assert ModelShape(layers=4, kv_heads=2).kv_bytes_per_token == 2048


def test_a_port_that_somebody_took_meanwhile_is_waited_for():
    (port,) = free_ports(1)
    wait_free([port], timeout_s=0.0)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(NoPortError, match=f"port {port} is taken"):
        wait_free([port], timeout_s=0.0)
    wait_free([port], timeout_s=30.0)


def test_a_port_that_comes_free_is_good():
    (port,) = free_ports(1)
    taken = socket.create_server(("127.0.0.1", port))
    release = threading.Timer(0.3, taken.close)
    release.start()
    wait_free([port], timeout_s=30.0)
    release.join()

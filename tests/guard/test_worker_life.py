"""A worker's life: a real process in front of a real server, and a scripted broker that keeps what it is told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BUDGET_S = 60.0
CONSERVE = Path(sys.executable).with_name("conserve")

# A server as small as an engine can be: healthy at once, ends with the code it is told, notes the signals it gets.
ENGINE = """
import http.server, json, os, signal, sys, threading
port, code, notes = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def note(text):
    with open(notes, "a") as out:
        print(text, file=out, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = {"incarnation": "life-7", "block_size_tokens": 16, "host_tier_tokens": 65536}
        told = {"/health": {}, "/conserve/engine": known}.get(self.path)
        self.send_response(200 if told is not None else 404)
        self.end_headers()
        self.wfile.write(json.dumps(told).encode())
    def log_message(self, *_):
        pass
def end(*_):
    note("TERM")
    os._exit(code)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGHUP, lambda *_: note("HUP"))
note("env " + os.environ.get("CONSERVE_GUARD_ENGINE_ID", "-"))
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class ScriptedBroker:
    """Answers the registration routes and keeps every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str, Any]] = []
        self.leases = 0
        self.status = 200
        self.status_of: dict[str, int] = {}
        broker = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                size = int(self.headers.get("content-length", 0))
                body = json.loads(self.rfile.read(size)) if size else None
                broker.calls.append((self.command, self.path, self.headers.get("authorization", ""), body))
                self.send_response(broker.status_of.get(self.command, broker.status))
                self.end_headers()
                self.wfile.write(json.dumps({"engine_id": "d0", "leases": broker.leases}).encode())

            do_GET = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 -- the base class's names

            def log_message(self, *_args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def made(self, method: str) -> list[tuple[str, str, str, Any]]:
        return [call for call in list(self.calls) if call[0] == method]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def broker() -> Iterator[ScriptedBroker]:
    scripted = ScriptedBroker()
    yield scripted
    scripted.close()


class RunningWorker:
    """`conserve worker` as a process."""

    def __init__(self, folder: Path, *options: str, code: int = 0, command: list[str] | None = None) -> None:
        self.notes_file = folder / "notes"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        engine = command or [sys.executable, "-c", ENGINE, str(self.port), str(code), str(self.notes_file)]
        own = ["--id", "d0", "--role", "decoder", "--url", self.url, "--model", "m", "--heartbeat-s", "0.2"]
        self.process = subprocess.Popen(
            [str(CONSERVE), "worker", *own, *options, "--", *engine],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CONSERVE_WORKER_KEY": "worker-secret", "CONSERVE_GUARD_KEYS": "main=env:NOT_READ_HERE"},
        )

    def notes(self) -> list[str]:
        return self.notes_file.read_text().splitlines() if self.notes_file.exists() else []

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=BUDGET_S)
        return self.process.returncode, said


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RunningWorker]]:
    started: list[RunningWorker] = []

    def begin(*options: str, **more: Any) -> RunningWorker:
        started.append(RunningWorker(tmp_path, *options, **more))
        return started[-1]

    yield begin
    for worker in started:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.communicate()


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + BUDGET_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never came true"
        time.sleep(0.02)


def test_it_registers_when_healthy_beats_drains_leaves_and_passes_the_exit_code_on(broker, start):
    worker = start("--broker", broker.url, "--tier", "fast", code=7)
    until(lambda: len(broker.made("PUT")) >= 3)
    worker.signal(signal.SIGTERM)
    code, said = worker.ended()
    assert code == 7, said
    assert worker.notes() == ["env d0", "TERM"]
    method, path, authorization, body = broker.made("PUT")[0]
    assert (method, path, authorization) == ("PUT", "/v1/engines/d0", "Bearer worker-secret")
    assert body == {
        "url": worker.url,
        "role": "decoder",
        "model": "m",
        "transfer_group": "nixl",
        "tier": "fast",
        "max_hold_ms": 30_000,
        "ttl_ms": 1_000,
        "incarnation": "life-7",
        "block_size_tokens": 16,
        "host_tier_tokens": 65_536,
    }
    ending = [(call[0], call[1]) for call in broker.calls if call[0] in ("POST", "DELETE")]
    assert ending == [("POST", "/v1/engines/d0/drain"), ("DELETE", "/v1/engines/d0")]


def test_it_waits_for_its_leases_and_beats_meanwhile(broker, start):
    broker.leases = 2
    worker = start("--broker", broker.url)
    until(lambda: broker.made("PUT"))
    worker.signal(signal.SIGTERM)
    until(lambda: len(broker.made("GET")) >= 2)
    assert worker.notes() == ["env d0"], "the engine goes on while it has leases"
    broker.leases = 0
    code, said = worker.ended()
    assert code == 0
    assert "draining: 2 leases left" in said
    drained_at = [call[0] for call in broker.calls].index("POST")
    assert any(call[0] == "PUT" for call in broker.calls[drained_at:])


def test_with_a_workers_key_it_leaves_first_and_is_not_called_back_by_a_heartbeat(broker, start):
    broker.status_of["POST"] = 403
    broker.leases = 2
    worker = start("--broker", broker.url)
    until(lambda: broker.made("PUT"))
    worker.signal(signal.SIGTERM)
    until(lambda: len(broker.made("GET")) >= 2)
    assert worker.notes() == ["env d0"], "the engine goes on while it has leases"
    broker.status_of["GET"] = 404
    code, said = worker.ended()
    assert code == 0
    assert "failed" not in said
    left_at = [call[0] for call in broker.calls].index("DELETE")
    assert all(call[0] != "PUT" for call in broker.calls[left_at:])


def test_a_second_signal_ends_the_waiting(broker, start):
    broker.leases = 1
    worker = start("--broker", broker.url)
    until(lambda: broker.made("PUT"))
    worker.signal(signal.SIGTERM)
    until(lambda: broker.made("GET"))
    worker.signal(signal.SIGINT)
    assert worker.ended()[0] == 0
    assert broker.made("DELETE")


def test_the_waiting_is_bounded(broker, start):
    broker.leases = 1
    worker = start("--broker", broker.url, "--drain-timeout-s", "0.5")
    until(lambda: broker.made("PUT"))
    worker.signal(signal.SIGTERM)
    assert worker.ended()[0] == 0


def test_a_broker_that_fails_never_ends_an_engine(broker, start):
    broker.status = 503
    worker = start("--broker", broker.url)
    until(lambda: len(broker.made("PUT")) >= 3)
    broker.status = 200
    seen = len(broker.made("PUT"))
    until(lambda: len(broker.made("PUT")) >= seen + 2)
    worker.signal(signal.SIGTERM)
    code, said = worker.ended()
    assert code == 0
    assert said.count("broker PUT /v1/engines/d0 failed") == 1
    assert "the broker answers again" in said


def test_other_signals_go_to_the_engine(start):
    worker = start()
    until(worker.notes)
    until(lambda: (worker.signal(signal.SIGHUP), "HUP" in worker.notes())[1])
    worker.signal(signal.SIGTERM)
    assert worker.ended()[0] == 0


def test_an_engine_that_dies_takes_its_entry_along(broker, start):
    worker = start("--broker", broker.url)
    until(lambda: broker.made("PUT"))
    # Ended from outside, as the kernel ends one that has no memory left.
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert worker.ended()[0] == 128 + signal.SIGKILL
    assert broker.made("DELETE")


def test_an_engine_that_ends_while_starting_gives_its_code(broker, start):
    worker = start("--broker", broker.url, command=[sys.executable, "-c", "raise SystemExit(5)"])
    assert worker.ended()[0] == 5
    assert broker.calls == []


def test_an_engine_that_never_gets_healthy_is_ended(broker, start):
    worker = start("--broker", broker.url, "--start-timeout-s", "0.3", command=["sleep", "600"])
    code, said = worker.ended()
    assert code == 1
    assert "not healthy after" in said
    assert broker.calls == []


def test_a_signal_while_starting_ends_the_engine(start):
    worker = start(command=["sleep", "600"])
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children")
    until(lambda: children.exists() and children.read_text().split())
    worker.signal(signal.SIGTERM)
    assert worker.ended()[0] == 128 + signal.SIGTERM

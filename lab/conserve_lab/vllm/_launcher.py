"""Our end of the fork server: start, kill and watch processes by name."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conserve_lab.vllm.errors import VllmStartError

__all__ = ["Launcher"]

SCRIPT = Path(__file__).parent / "runtime" / "fork_server.py"
CLOSE_BUDGET_S = 10.0


@dataclass(kw_only=True)
class _Process:
    pid: int | None = None
    code: int | None = None


class Launcher:
    """A running fork server.

    Args:
        python: The interpreter of vLLM's environment.
        env: The environment that all servers share.
        log: Where the fork server itself writes what libraries print.
    """

    def __init__(self, python: Path, *, env: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._ready = False
        self._ended = False
        self._processes: dict[str, _Process] = {}
        self._changed = threading.Condition()
        with log.open("ab") as output:
            self._server = subprocess.Popen(  # noqa: S603  our own script
                [str(python), str(SCRIPT)],
                env=dict(env),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # ^C goes to us; we close it
            )
        self._listener = threading.Thread(target=self._listen, name="vllm-launcher", daemon=True)
        self._listener.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until vLLM is imported.

        Raises:
            VllmStartError: It is not, in this time or ever.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended, timeout_s)
            if not self._ready:
                raise VllmStartError(f"vLLM could not be imported within {timeout_s:.0f} s; read {self._log}")

    def start(self, name: str, *, argv: Sequence[str], env: Mapping[str, str], log: Path, timeout_s: float) -> int:
        """Start a server; returns its process id.

        Raises:
            VllmStartError: The fork server did not answer.
        """
        process = _Process()
        with self._changed:
            self._processes[name] = process
            self._send({"do": "start", "name": name, "argv": list(argv), "env": dict(env), "log": str(log)})
            self._changed.wait_for(lambda: process.pid is not None or self._ended, timeout_s)
            if process.pid is None:
                raise VllmStartError(f"the launcher did not start {name} within {timeout_s:.0f} s; read {self._log}")
            return process.pid

    def kill(self, name: str, *, timeout_s: float) -> None:
        """Kill a server with all it started, and wait for its end; a dead one stays dead.

        Raises:
            VllmStartError: It did not end in this time.
        """
        with self._changed:
            process = self._processes[name]
            if process.code is None:
                self._send({"do": "kill", "name": name})
            if not self._changed.wait_for(lambda: process.code is not None or self._ended, timeout_s):
                raise VllmStartError(f"{name} (pid {process.pid}) did not end within {timeout_s:.0f} s")

    def exit_code(self, name: str) -> int | None:
        """How a server ended (minus the signal's number if by a signal), or None while it runs."""
        with self._changed:
            return self._processes[name].code

    def wait_exit(self, name: str, *, timeout_s: float) -> int | None:
        """Wait for a server's own end; returns its exit code, or None if it still runs."""
        with self._changed:
            process = self._processes[name]
            self._changed.wait_for(lambda: process.code is not None or self._ended, timeout_s)
            return process.code

    def close(self) -> None:
        """End the fork server, and every server with it."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended before us
            self._server.stdin.close()
        try:
            self._server.wait(CLOSE_BUDGET_S)
        except subprocess.TimeoutExpired:
            self._server.kill()  # its servers have asked the kernel to die with it
            self._server.wait()
        self._listener.join()
        self._server.stdout.close()

    def _send(self, command: Mapping[str, Any]) -> None:
        assert self._server.stdin is not None
        try:
            self._server.stdin.write((json.dumps(command) + "\n").encode())
            self._server.stdin.flush()
        except BrokenPipeError as error:
            raise VllmStartError(f"the launcher has ended; read {self._log}") from error

    def _listen(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            event = json.loads(line)
            with self._changed:
                self._note(event)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _note(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "ready":
            self._ready = True
            return
        process = self._processes[event["name"]]
        if event["event"] == "started":
            process.pid = event["pid"]
        elif process.pid == event["pid"]:  # not a predecessor of the same name
            process.code = event["code"]

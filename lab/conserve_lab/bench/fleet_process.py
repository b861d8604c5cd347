"""Emulated engines in a process of their own that can be killed and started again one by one."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection
from typing import Any, Self

from conserve_lab.demo.errors import DemoError
from conserve_lab.emulator import EmulatedFleet, FleetConfig

_BUDGET_S = 60.0


class FleetProcess:
    """The child; a context manager.

    Args:
        config: the engines.

    Raises:
        DemoError: it did not start (on entering), or ended.
    """

    def __init__(self, config: FleetConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, self._child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._child_end, config), daemon=True)
        self._entries: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._process.start()
        self._child_end.close()
        self._entries = self._received()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._pipe.close()
        self._process.join(_BUDGET_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    @property
    def pid(self) -> int:
        """Of the child."""
        assert self._process.pid is not None, "started on entering"
        return self._process.pid

    def broker_engines(self) -> list[dict[str, Any]]:
        """The engines as entries of a broker's configuration."""
        return self._entries

    def kill(self, engine_id: str) -> None:
        """End an engine as a crash does."""
        self._told("kill", engine_id)

    def restart(self, engine_id: str) -> None:
        """Start it again, with an empty cache."""
        self._told("restart", engine_id)

    def held_requests(self) -> int:
        """Finished requests whose blocks engines still hold for somebody."""
        return int(self._told("held", ""))

    def _told(self, what: str, engine_id: str) -> Any:
        try:
            self._pipe.send((what, engine_id))
        except (BrokenPipeError, ConnectionResetError):
            raise DemoError("the process of the engines ended unexpectedly") from None
        return self._received()

    def _received(self) -> Any:
        try:
            if self._pipe.poll(_BUDGET_S):
                return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise DemoError("the process of the engines ended unexpectedly") from None
        raise DemoError("the process of the engines does not answer")


def _serve(pipe: Connection, config: FleetConfig) -> None:
    """Run in the child until the parent's end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its closing of the pipe is ours
    with EmulatedFleet(config) as fleet:
        lease_ms = config.engine[0].kv_lease_ms
        sizes = {"kv_capacity_tokens": config.engine[0].kv_cache_tokens, "max_hold_ms": lease_ms}
        pipe.send([{**engine, **sizes} for engine in fleet.broker_engines()])
        while True:
            try:
                what, engine_id = pipe.recv()
            except EOFError:
                return
            answer: Any = None
            match what:
                case "kill":
                    fleet.kill(engine_id)
                case "restart":
                    fleet.restart(engine_id)
                case _:
                    answer = sum(engine.held_requests for engine in fleet.engines if engine.alive)
            pipe.send(answer)

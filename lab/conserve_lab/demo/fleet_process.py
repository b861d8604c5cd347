"""Emulated engines in a process of their own.

Agents and engines in one interpreter would wait for each other's bytecode, and the times measured would be those of
the interpreter. One child process serves all runs of a demo, one fleet after the other.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

from conserve_lab.emulator import EmulatedFleet, FleetConfig
from conserve_lab.stack import broker_entries

START_BUDGET_S = 60.0
_STOP_BUDGET_S = 20.0


class FleetProcessError(Exception):
    """The child process did not do what was asked; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFleet:
    """A fleet in the child process.

    Attributes:
        entries: its engines as entries of the broker's `engine` table.
    """

    model: str
    entries: tuple[dict[str, Any], ...]


class FleetProcess:
    """A child process that runs emulated fleets; a context manager. The child ends with its parent."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_end,), name="conserve-emulated-fleet", daemon=True)
        self._process.start()
        child_end.close()

    @contextmanager
    def fleet(self, config: FleetConfig) -> Iterator[RemoteFleet]:
        """Start a fleet, and stop it after the block.

        Raises:
            FleetProcessError: it did not start.
        """
        answer = self._ask(config, START_BUDGET_S)
        if isinstance(answer, str):
            raise FleetProcessError(f"the emulated fleet did not start: {answer}")
        yield answer
        self._ask(None, _STOP_BUDGET_S)

    def kill(self, engine_id: str) -> None:
        """Kill an engine of the running fleet, as if its process had died.

        Raises:
            FleetProcessError: the fleet has no such engine.
        """
        answer = self._ask(engine_id, _STOP_BUDGET_S)
        if isinstance(answer, str):
            raise FleetProcessError(answer)

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return self._process.pid

    def close(self) -> None:
        """End the child."""
        self._pipe.close()
        self._process.join(_STOP_BUDGET_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _ask(self, order: FleetConfig | str | None, budget_s: float) -> Any:
        try:
            self._pipe.send(order)
            if not self._pipe.poll(budget_s):
                raise FleetProcessError(f"the emulated fleet did not answer within {budget_s:.0f} s")
            return self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise FleetProcessError("the process of the emulated fleet ended unexpectedly") from None


def _killed(fleet: EmulatedFleet, engine_id: str) -> str | None:
    try:
        fleet.kill(engine_id)
    except KeyError as error:
        return str(error.args[0])
    return None


def _serve(pipe: Connection) -> None:
    """Run in the child: a fleet for every configuration received, until the parent's end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its closing of the pipe is ours
    try:
        while True:
            config = pipe.recv()
            try:
                with EmulatedFleet(config) as fleet:
                    pipe.send(RemoteFleet(model=fleet.engines[0].model, entries=tuple(broker_entries(fleet))))
                    while (victim := pipe.recv()) is not None:
                        pipe.send(_killed(fleet, victim))
            except OSError as error:
                pipe.send(str(error))
            else:
                pipe.send(None)
    except EOFError:
        return

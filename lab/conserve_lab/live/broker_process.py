"""A broker in a process of its own, so that what it costs is its process's."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, Self

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.demo.cpu import process_cpu_s
from conserve_lab.demo.errors import DemoError

START_BUDGET_S = 60.0
_STOP_BUDGET_S = 20.0


class BrokerProcess:
    """A broker over the given engines; a context manager. It ends with its parent.

    Args:
        tables: its configuration.

    Raises:
        DemoError: it did not see all engines ready in time (on entering).
    """

    def __init__(self, tables: Mapping[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, self._child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._child_end, dict(tables)), daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        self._process.start()
        self._child_end.close()
        try:
            answer = self._pipe.recv() if self._pipe.poll(2 * START_BUDGET_S) else ("", "it did not answer")
        except EOFError:
            answer = ("", "its process ended")
        self.url, problem = answer
        if problem:
            self._end()
            raise DemoError(f"the broker did not start: {problem}")
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end()

    def cpu_s(self) -> float:
        """CPU seconds of the broker so far; 0 where the system does not tell (not Linux)."""
        return (process_cpu_s(self._process.pid) or 0.0) if self._process.pid is not None else 0.0

    def _end(self) -> None:
        self._pipe.close()
        self._process.join(_STOP_BUDGET_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection, tables: dict[str, Any]) -> None:
    """Run in the child until the parent's end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its closing of the pipe is ours
    logging.getLogger("conserve").setLevel(logging.ERROR)  # that engines die here is the parent's doing
    try:
        config = BrokerConfig.from_mapping(tables)
        with BrokerServer(config) as broker:
            broker.wait_until_ready(timeout_s=START_BUDGET_S, engines=len(config.engine))
            pipe.send((broker.url, ""))
            pipe.recv()
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001  # whatever it is, the parent says it
        pipe.send(("", f"{type(error).__name__}: {error}"))

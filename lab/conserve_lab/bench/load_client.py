"""The load: a process of its own that speaks HTTP/1.1 over kept connections with as little code as will do.

A general client costs more CPU per request than the broker, and would measure itself. Every answer is read whole and
its status checked.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Self

import uvicorn

from conserve_lab.demo.errors import DemoError

_STOP_BUDGET_S = 10.0
_ANSWER_BUDGET_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to send.

    Attributes:
        bodies: sent in order, each once; empty: `template`.
        template: a body in which ``%d`` becomes a number that was never used before.
        connections: kept open, each with one request at a time.
        seconds: how long; with `bodies`, at most.
        per_s: requests a second over all connections; 0: as fast as answers come. Times then count from the instant
            at which a request was due, so that a stalled server cannot hide its stall.
    """

    port: int
    path: str
    bodies: Sequence[bytes] = ()
    template: str = ""
    connections: int = 32
    seconds: float = 1.0
    per_s: float = 0.0


@dataclass(slots=True)
class Taken:
    """What came of it: times of good answers in milliseconds, other answers by status, and how long all of it took."""

    ms: list[float] = field(default_factory=list)
    bad: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


class LoadClient:
    """The child; a context manager."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, self._child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._child_end,), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        self._child_end.close()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._pipe.close()
        self._process.join(_STOP_BUDGET_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def run(self, job: Job) -> Taken:
        """Send it all.

        Raises:
            DemoError: the child ended, or an answer was not what it should be.
        """
        try:
            self._pipe.send(job)
            if not self._pipe.poll(job.seconds + _ANSWER_BUDGET_S):
                raise DemoError("the load process does not answer")
            taken = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise DemoError("the load process ended unexpectedly") from None
        if isinstance(taken, str):
            raise DemoError(f"the load failed: {taken}")
        assert isinstance(taken, Taken), "the child sends nothing else"
        return taken


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its closing of the pipe is ours
    numbers = itertools.count(time.time_ns() // 1_000)
    factory = uvicorn.Config(lambda: None, log_config=None).get_loop_factory()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            with asyncio.Runner(loop_factory=factory) as runner:
                pipe.send(runner.run(_play(job, numbers)))
        except (OSError, EOFError) as error:
            pipe.send(repr(error))


async def _play(job: Job, numbers: Iterator[int]) -> Taken:
    taken = Taken()
    bodies = iter(job.bodies) if job.bodies else (job.template.replace("%d", str(each)).encode() for each in numbers)
    began_s = time.perf_counter()
    until_s = began_s + job.seconds
    pace_s = job.connections / job.per_s if job.per_s else 0.0
    await asyncio.gather(
        *(
            _talk(job, bodies, taken, due_s=began_s + pace_s * index / job.connections, pace_s=pace_s, until_s=until_s)
            for index in range(job.connections)
        )
    )
    taken.seconds = time.perf_counter() - began_s
    return taken


async def _talk(
    job: Job, bodies: Iterator[bytes], taken: Taken, *, due_s: float, pace_s: float, until_s: float
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", job.port)
    head = f"POST {job.path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: ".encode()
    clock: Callable[[], float] = time.perf_counter
    try:
        while max(due_s, clock()) < until_s:
            if pace_s and due_s > clock():
                await asyncio.sleep(due_s - clock())
            body = next(bodies, None)
            if body is None:
                return
            sent_s = due_s if pace_s else clock()
            writer.write(b"%s%d\r\n\r\n%s" % (head, len(body), body))
            status = await _answered(reader)
            if status < 300:
                taken.ms.append((clock() - sent_s) * 1_000)
            else:
                taken.bad[status] = taken.bad.get(status, 0) + 1
            due_s += pace_s
    finally:
        writer.close()


async def _answered(reader: asyncio.StreamReader) -> int:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    _, _, after = head.partition(b"content-length: ")
    await reader.readexactly(int(after.partition(b"\r\n")[0] or 0))
    return int(head[9:12])


def percentiles(ms: Sequence[float]) -> dict[str, Any]:
    """p50, p99 and p99.9 by nearest rank, and of how many."""
    ordered = sorted(ms)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 3) if ordered else 0.0

    return {"p50_ms": at(0.5), "p99_ms": at(0.99), "p999_ms": at(0.999), "n": len(ordered)}

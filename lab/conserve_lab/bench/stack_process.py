"""Broker and emulated engines in a process of their own, so that the client's process holds nothing but the client."""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

from conserve_lab.demo.errors import DemoError
from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack

START_BUDGET_S = 90.0
_STOP_BUDGET_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the child serves.

    Attributes:
        prefiller, decoder: base URLs without `/v1`.
    """

    broker_url: str
    prefiller: str
    decoder: str
    model: str


class StackProcess:
    """One broker, one prefiller and one decoder that answer as fast as they can; a context manager.

    Args:
        answer_tokens: how long an answer is that no `max_tokens` cuts short.

    Raises:
        DemoError: the child did not start (on entering).
    """

    def __init__(self, *, answer_tokens: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, self._child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._child_end, answer_tokens), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        self._child_end.close()
        answer = self._receive(START_BUDGET_S)
        if not isinstance(answer, Addresses):
            raise DemoError(f"broker and engines did not start: {answer}")
        self.at = answer
        return self

    def __exit__(self, *_exc: object) -> None:
        self._pipe.close()
        self._process.join(_STOP_BUDGET_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def engine_requests(self) -> Counter[str]:
        """Requests that each engine has answered since the last call, by engine id."""
        self._pipe.send("requests")
        return Counter(self._receive(_STOP_BUDGET_S))

    def _receive(self, budget_s: float) -> Any:
        try:
            if not self._pipe.poll(budget_s):
                raise DemoError(f"broker and engines did not answer within {budget_s:.0f} s")
            return self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise DemoError("the process of broker and engines ended unexpectedly") from None


def _serve(pipe: Connection, answer_tokens: int) -> None:
    """Run in the child until the parent's end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its closing of the pipe is ours
    fleet = default_fleet(
        prefillers=1,
        decoders=1,
        time_scale=0.0,
        tool_calls_min=0,
        tool_calls_max=0,
        answer_tokens_min=answer_tokens,
        answer_tokens_max=answer_tokens,
    )
    try:
        with LocalStack(fleet=fleet, preset="paper") as stack:
            engine = stack.fleet.engine
            pipe.send(
                Addresses(
                    broker_url=stack.broker_url,
                    prefiller=engine("p0").url,
                    decoder=engine("d0").url,
                    model=stack.model,
                )
            )
            while pipe.recv():
                counts = {each.id: len(each.requests) for each in stack.fleet.engines}
                for each in stack.fleet.engines:
                    each.clear_requests()
                pipe.send(counts)
    except EOFError:
        return
    except (OSError, TimeoutError) as error:
        pipe.send(str(error))

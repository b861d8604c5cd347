"""Following a turn while it runs: what an observer is told, and the loop that tells all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, cast, runtime_checkable

from conserve_sdk.core._quick import quick_init
from conserve_sdk.core.units import ConversationId, EngineId, LineageId
from conserve_sdk.telemetry._record import TurnHook, TurnRecord

__all__ = ["Follower", "HopEnd", "HopStart", "Phase", "TurnObserver", "TurnStart", "TurnWatch", "Watching"]

log = logging.getLogger("conserve_sdk.turn")

Phase: TypeAlias = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnStart:
    """A turn that arrived.

    Attributes:
        path: the OpenAI route it uses, such as `/v1/chat/completions`.
        streams: whether the application asked for a stream.
        trace: `traceparent` and `tracestate` that the application sent itself, by lower-case name.
        at_us: the instant, on a monotonic clock whose differences alone mean something.
    """

    conversation_id: ConversationId
    lineage: LineageId
    model: str
    path: str
    turn: int
    streams: bool
    at_us: int
    trace: Mapping[str, str] = field(default_factory=dict)


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class HopStart:
    """A request that is about to be sent to an engine.

    Attributes:
        url: where it goes.
        request_id: its `X-Request-Id`, which vLLM puts into its own id of the request.
    """

    phase: Phase
    engine_id: EngineId
    url: str
    request_id: str
    at_us: int


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class HopEnd:
    """A request to an engine that is over.

    Attributes:
        status: HTTP status, or the one that an error in the stream named; None without an answer.
        error: class of failure, empty when there was none.
    """

    status: int | None
    error: str
    at_us: int


class TurnWatch(Protocol):
    """One turn, followed by one observer. Calls come one after the other, from whichever thread runs the turn."""

    def begin_hop(self, hop: HopStart, headers: MutableMapping[str, str], /) -> None:
        """A request is about to be sent; `headers` are its own and may be changed."""
        ...

    def end_hop(self, hop: HopEnd, /) -> None:
        """The request begun last is over. Each `begin_hop` gets one, at the latest when its turn ends."""
        ...

    def end(self, record: TurnRecord, /, *, at_us: int) -> None:
        """The turn is over, well or not. Called once, and last."""
        ...


@runtime_checkable
class TraceCarrier(Protocol):
    """A `TurnWatch` whose trace the broker may join."""

    def carry(self, headers: MutableMapping[str, str], /) -> None:
        """Add the headers of the turn's trace to those of a request to the broker."""
        ...


@runtime_checkable
class TurnObserver(Protocol):
    """A hook that follows turns while they run."""

    def begin_turn(self, turn: TurnStart, /) -> TurnWatch:
        """A turn arrived. Called in the context (`contextvars`) of the application's call, before anything is sent."""
        ...


Follower: TypeAlias = TurnHook | TurnObserver
"""What `on_turn` takes."""


class Watching:
    """Tells every hook and observer about one turn. One that raises is logged and left out from then on.

    Args:
        followers: told in this order.
        start: the turn.
        clock_us: the clock of `start.at_us`.
    """

    def __init__(self, followers: Iterable[Follower], start: TurnStart, *, clock_us: Callable[[], int]) -> None:
        self._clock_us = clock_us
        self._watches: list[TurnWatch] = []
        self._hop_watches: list[TurnWatch] = []
        self._trace = start.trace
        self._hop_is_open = False
        self._status: int | None = None
        for follower in followers:
            try:
                watch = _watch(follower, start)
            except Exception:
                log.exception("turn_hook_failed hook=%r", follower)
                continue
            self._watches.append(watch)
            if not isinstance(watch, EndWatch):
                self._hop_watches.append(watch)

    def begin_hop(
        self, *, phase: Phase, engine_id: EngineId, url: str, headers: MutableMapping[str, str], request_id: str
    ) -> None:
        """A request is about to be sent."""
        self.end_hop(None)
        self._hop_is_open, self._status = True, None
        if not self._hop_watches:
            return
        hop = HopStart(phase=phase, engine_id=engine_id, url=url, request_id=request_id, at_us=self._clock_us())
        self._tell(self._hop_watches, lambda watch: watch.begin_hop(hop, headers))

    def trace_headers(self) -> dict[str, str]:
        """What lets the broker join the turn's trace: of the first observer that has one, else as the application sent.

        An observer has one if it is a `TraceCarrier`.
        """
        headers: dict[str, str] = {}
        self._tell(
            self._watches,
            lambda watch: watch.carry(headers) if isinstance(watch, TraceCarrier) and not headers else None,
        )
        return headers or dict(self._trace)

    def answered(self, status: int) -> None:
        """The first bytes of the answer are there; an error ends the hop, anything else goes on to the turn's end."""
        self._status = status
        if status >= 400:
            self.end_hop(status)

    def end_hop(self, status: int | None, *, error: str = "") -> None:
        """The request is over; idempotent."""
        if not self._hop_is_open:
            return
        self._hop_is_open = False
        if not self._hop_watches:
            return
        failure = error or (f"http_{status}" if status is not None and status >= 400 else "")
        end = HopEnd(status=status, error=failure, at_us=self._clock_us())
        self._tell(self._hop_watches, lambda watch: watch.end_hop(end))

    def end(self, record: TurnRecord) -> None:
        """The turn is over."""
        self.end_hop(self._status, error=record.error)
        at_us = self._clock_us()
        self._tell(self._watches, lambda watch: watch.end(record, at_us=at_us))

    def _tell(self, watches: list[TurnWatch], tell: Callable[[TurnWatch], None]) -> None:
        for watch in tuple(watches):
            try:
                tell(watch)
            except Exception:
                log.exception("turn_hook_failed hook=%r", watch)
                self._watches.remove(watch)
                if watch in self._hop_watches:
                    self._hop_watches.remove(watch)


class EndWatch:
    """A watch that wants the end of the turn only: hops are not even described to it."""

    __slots__ = ()

    def begin_hop(self, hop: HopStart, headers: MutableMapping[str, str], /) -> None:
        """Nothing to tell."""

    def end_hop(self, hop: HopEnd, /) -> None:
        """Nothing to tell."""


class _Hooked(EndWatch):
    """A plain hook."""

    __slots__ = ("_hook",)

    def __init__(self, hook: TurnHook) -> None:
        self._hook = hook

    def __repr__(self) -> str:
        return repr(self._hook)

    def end(self, record: TurnRecord, /, *, at_us: int) -> None:  # noqa: ARG002 -- the protocol's
        """Call the hook."""
        self._hook(record)


def _watch(follower: Follower, start: TurnStart) -> TurnWatch:
    begin_turn = getattr(follower, "begin_turn", None)  # isinstance with a protocol takes 10 us, on every turn
    return (
        _Hooked(cast("TurnHook", follower)) if begin_turn is None else cast("TurnObserver", follower).begin_turn(start)
    )

"""What all turns of one ConServe object share."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from conserve_sdk._lineage import LineageBook
from conserve_sdk._prompts import PromptReader
from conserve_sdk._recent import ContextFollower
from conserve_sdk._registry import LeaseRef, LeaseRegistry
from conserve_sdk._reporter import Reporter
from conserve_sdk._turn.budget import Timeouts
from conserve_sdk._turn.planner import LeasePlanner, TurnPlanner
from conserve_sdk.protocol import Binding
from conserve_sdk.telemetry import Follower, StatsBook, TurnStart, Watching

__all__ = ["TurnKit", "TurnOptions"]

log = logging.getLogger("conserve_sdk.turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnOptions:
    """How turns behave.

    Attributes:
        wait_ms: how long a first turn may wait for admission.
        timeouts: all other time limits.
        fall_back: without a broker, new conversations go to `fallback_engines`; else they raise `BrokerUnavailable`.
        fallback_engines: base URLs of engines that answer without a lease.
        stranger_bytes_max: a request that extends nothing and is at most this long (a title, a summary, a guardrail)
            rides on the decoder of its conversation instead of taking a lease.
        slice_chars: longer prompts are computed in slices of so many characters; 0: whole.
        client: how this program names itself to the broker.
    """

    wait_ms: int = 30_000
    timeouts: Timeouts = field(default_factory=Timeouts)
    fall_back: bool = True
    fallback_engines: tuple[str, ...] = ()
    stranger_bytes_max: int = 1_024
    slice_chars: int = 0
    client: str = ""


@dataclass(slots=True, kw_only=True)
class TurnKit:
    """Shared state and seams of the flows. Thread-safe; does no I/O itself.

    Attributes:
        clock_us: monotonic microseconds; the registry's milliseconds are the same clock.
        wall_ms: Unix milliseconds, to rank turns of several processes.
    """

    registry: LeaseRegistry
    book: LineageBook
    reporter: Reporter
    clock_us: Callable[[], int]
    wall_ms: Callable[[], int] = lambda: 0
    hooks: Sequence[Follower] = ()
    stats: StatsBook = field(default_factory=StatsBook)
    planner: TurnPlanner = field(default_factory=LeasePlanner)
    options: TurnOptions = field(default_factory=TurnOptions)
    prompts: PromptReader = field(default_factory=PromptReader)
    _running: Counter[LeaseRef] = field(default_factory=Counter)
    _sent: Counter[LeaseRef] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _broker_rests_until_ms: int = 0
    _warned: set[str] = field(default_factory=set)

    def now_ms(self) -> int:
        """The registry's clock."""
        return self.clock_us() // 1000

    def new_request_id(self) -> str:
        """An id for one request to an engine, never used before."""
        return os.urandom(16).hex()

    def turn_begins(self, ref: LeaseRef) -> None:
        """Count a running turn of a lineage."""
        with self._lock:
            self._running[ref] += 1

    def turn_sent(self, ref: LeaseRef) -> None:
        """A running turn is at its engines now."""
        with self._lock:
            self._sent[ref] += 1

    def turn_ends(self, ref: LeaseRef, *, sent: bool, tell: Callable[[bool], None]) -> None:
        """Count it out again.

        Args:
            ref: the lineage.
            sent: whether `turn_sent` was called for it.
            tell: called with whether no other turn of the lineage is running, before the next turn is counted out: of
                turns that end at once, the last one to be told about is the one that left the lineage idle.
        """
        with self._lock:
            self._sent[ref] -= sent
            if self._sent[ref] <= 0:
                del self._sent[ref]
            self._running[ref] -= 1
            idle = self._running[ref] <= 0
            if idle:
                del self._running[ref]
            tell(idle)

    def is_answering(self, ref: LeaseRef) -> bool:
        """Whether a turn of the lineage is at its engines."""
        with self._lock:
            return self._sent[ref] > 0

    def watch(self, start: TurnStart) -> Watching:
        """Let every hook follow a turn; one that fails is logged and changes nothing."""
        return Watching((self.stats, ContextFollower(), *self.hooks), start, clock_us=self.clock_us)

    def warn_once(self, key: str, message: str) -> None:
        """Log a warning about how the application uses the SDK, once per process and kind."""
        with self._lock:
            known = key in self._warned
            self._warned.add(key)
        if not known:
            log.warning(message)

    # ---- without a broker -------------------------------------------------------------------------------------

    def broker_failed(self) -> None:
        """Leave the broker alone for a while: turns that fall back must not wait for it each time."""
        self._broker_rests_until_ms = self.now_ms() + int(self.options.timeouts.broker_rest_s * 1000)

    def broker_answered(self) -> None:
        """The broker is back."""
        self._broker_rests_until_ms = 0

    def skips_broker(self) -> bool:
        """Whether a turn should go to the fallback engines without asking the broker."""
        return self.can_fall_back() and self.now_ms() < self._broker_rests_until_ms

    def can_fall_back(self) -> bool:
        """Whether there is a way to answer without a broker."""
        return self.options.fall_back and bool(self.options.fallback_engines)

    def fallback_engine(self, conversation_id: str, *, attempt: int) -> Binding:
        """The engine of a conversation without a lease: the same one in every process, the next one per attempt.

        Rendezvous hashing (Thaler, Ravishankar 1998): adding an engine moves only the conversations it takes over.
        """

        def weight(url: str) -> bytes:
            return blake2b(f"{conversation_id}\0{url}".encode(), digest_size=8).digest()

        ranked = sorted(self.options.fallback_engines, key=weight)
        url = ranked[attempt % len(ranked)]
        return Binding(engine_id=url, url=url, incarnation="")

    def after_fork(self) -> None:
        """In a forked child: nothing of the parent's turns is running here, and locks may be held by nobody."""
        self._lock = threading.Lock()
        self._running = Counter()
        self._sent = Counter()

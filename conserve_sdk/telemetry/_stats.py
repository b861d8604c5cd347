"""A conversation's turns in one table, in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from conserve_sdk._fork import call_in_forked_child
from conserve_sdk.core.units import ConversationId
from conserve_sdk.telemetry._record import TurnRecord

__all__ = ["CONVERSATIONS_MAX", "RECENT_MAX", "ConversationStats", "StatsBook", "Tally"]

CONVERSATIONS_MAX = 512
"""Conversations a `StatsBook` remembers; the one that was quiet longest goes first."""
RECENT_MAX = 32
"""Turns that are kept one by one; older ones stay in the sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationStats:
    """What a conversation's turns cost so far; `print` shows it as a table. Holds no prompt text.

    Attributes:
        turns: that ended, failed ones included.
        errors: turns that failed.
        migrations: KV transfers from a prefiller to a decoder.
        hops: HTTP requests to engines.
        failovers: turns that had to take another decoder.
        losses: how often each thing was lost (`prefill_failed`, `transfer_failed`, ...).
        prompt_tokens, cached_tokens, completion_tokens: sums of the engines' `usage`; cached ones are part of the
            prompt's.
        lease_wait_ms: time spent waiting for the broker, over all turns.
        recent: the last turns, at most `RECENT_MAX`, the newest last; without their times between tokens.
    """

    conversation_id: ConversationId
    turns: int = 0
    errors: int = 0
    migrations: int = 0
    hops: int = 0
    failovers: int = 0
    losses: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    lease_wait_ms: int = 0
    recent: tuple[TurnRecord, ...] = ()

    @property
    def last(self) -> TurnRecord | None:
        """The turn that ended last."""
        return self.recent[-1] if self.recent else None

    def __str__(self) -> str:
        """The table."""
        return "\n".join([*_summary(self), *(_table([_HEAD, *map(_row, self.recent)]) if self.recent else ())])


_SUMMED = (
    "turns",
    "errors",
    "migrations",
    "hops",
    "failovers",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "lease_wait_ms",
)


class _Guard:
    """One lock for all sums of the process: held for microseconds, and the only one to be made anew in a fork."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def after_fork(self) -> None:
        self.lock = threading.Lock()


_guard = _Guard()
call_in_forked_child(_guard.after_fork)


class Tally:
    """Adds up the turns of one conversation. Thread-safe."""

    def __init__(self, conversation_id: ConversationId) -> None:
        self.conversation_id = conversation_id
        self._sums = dict.fromkeys(_SUMMED, 0)
        self._losses: dict[str, int] = {}
        self._recent: deque[TurnRecord] = deque(maxlen=RECENT_MAX)

    def __call__(self, record: TurnRecord, /) -> None:
        """Add a turn; one of another conversation is none of this tally's business."""
        if record.conversation_id != self.conversation_id:
            return
        kept = replace(record, tbt_us=()) if record.tbt_us else record
        with _guard.lock:
            self._recent.append(kept)
            self._add(record)

    def stats(self) -> ConversationStats:
        """The sums so far."""
        with _guard.lock:
            return ConversationStats(
                conversation_id=self.conversation_id,
                losses=dict(self._losses),
                recent=tuple(self._recent),
                **self._sums,
            )

    def _add(self, record: TurnRecord) -> None:
        sums = self._sums
        sums["turns"] += 1
        sums["errors"] += bool(record.error)
        sums["migrations"] += record.migrated
        sums["hops"] += record.hops
        sums["failovers"] += record.failovers
        sums["prompt_tokens"] += record.prompt_tokens
        sums["cached_tokens"] += record.cached_tokens
        sums["completion_tokens"] += record.completion_tokens
        sums["lease_wait_ms"] += record.lease_wait_ms
        if record.loss:
            self._losses[record.loss] = self._losses.get(record.loss, 0) + 1


class StatsBook:
    """A hook that keeps a tally for each of the last `CONVERSATIONS_MAX` conversations. Thread-safe."""

    def __init__(self) -> None:
        self._tallies: OrderedDict[ConversationId, Tally] = OrderedDict()

    def __call__(self, record: TurnRecord, /) -> None:
        """Add a turn."""
        with _guard.lock:
            tally = self._tallies.get(record.conversation_id)
            if tally is None:
                tally = self._tallies[record.conversation_id] = Tally(record.conversation_id)
            self._tallies.move_to_end(record.conversation_id)
            while len(self._tallies) > CONVERSATIONS_MAX:
                self._tallies.popitem(last=False)
        tally(record)

    def stats(self, conversation_id: ConversationId) -> ConversationStats:
        """The sums of one conversation; all zero when it is unknown or long forgotten."""
        with _guard.lock:
            tally = self._tallies.get(conversation_id)
        return ConversationStats(conversation_id=conversation_id) if tally is None else tally.stats()


_HEAD = (
    *("turn", "lineage", "mode", "decoder", "prefiller"),
    *("prompt", "cached", "answer", "hops", "TTFT ms", "TTFET ms", "finish", "loss"),
)
_NUMBERS = frozenset({"turn", "prompt", "cached", "answer", "hops", "TTFT ms", "TTFET ms"})


def _summary(stats: ConversationStats) -> Iterable[str]:
    share = f" ({stats.cached_tokens * 100 // stats.prompt_tokens} %)" if stats.prompt_tokens else ""
    counts = (
        _count(stats.turns, "turn"),
        _count(stats.migrations, "migration"),
        _count(stats.hops, "engine request"),
        _count(stats.failovers, "failover"),
        _count(stats.errors, "error"),
    )
    yield f"conversation {stats.conversation_id}: {', '.join(counts)}"
    yield (
        f"tokens: {stats.prompt_tokens:,} prompt, of which {stats.cached_tokens:,} cached{share}; "
        f"{stats.completion_tokens:,} answer. Waited {stats.lease_wait_ms:,} ms for the broker"
    )
    if stats.losses:
        yield "lost: " + ", ".join(f"{name} {count}" for name, count in sorted(stats.losses.items()))
    if stats.turns > len(stats.recent):
        yield f"the last {len(stats.recent)} turns:"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _row(record: TurnRecord) -> tuple[str, ...]:
    return (
        str(record.turn),
        record.lineage,
        record.mode or "-",
        record.decoder_id or "-",
        (record.prefill_engine_id if record.migrated else None) or "-",
        *(f"{number:,}" for number in (record.prompt_tokens, record.cached_tokens, record.completion_tokens)),
        str(record.hops),
        *("-" if number is None else f"{number:,}" for number in (record.ttft_ms, record.ttfet_ms)),
        record.error or record.finish_reason or "-",
        record.loss or "-",
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    for row in rows:
        cells = zip(_HEAD, row, widths, strict=True)
        shown = (text.rjust(width) if head in _NUMBERS else text.ljust(width) for head, text, width in cells)
        yield "  ".join(shown).rstrip()

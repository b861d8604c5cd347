"""What the SDK tells about each turn: one `TurnRecord` to every hook, after the turn ended.

Hooks run in the thread that finished the turn and must be quick; an exception out of a hook is logged by the caller
and changes nothing. Records and log lines never hold prompt text.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from conserve_sdk.core.units import ConversationId, EngineId, LeaseId, LineageId

__all__ = ["TBT_SAMPLES_MAX", "LoggingHook", "TurnCollector", "TurnHook", "TurnRecord", "percentile"]

TBT_SAMPLES_MAX = 4096
"""Times between tokens kept per turn; a longer answer keeps its first ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """One turn, as its client saw it.

    Attributes:
        lease_id: None when the turn ran without a lease (a tiny stranger, or the fallback without a broker).
        epoch: the lease's epoch, 0 without a lease.
        turn: position in its lineage, from 1.
        first_turn: whether it extended no known prefix (or its lease had ended), so that all of it was prefilled.
        mode: where the lease said to prefill the first turn; None without a lease.
        path: the OpenAI route it used, such as `/v1/chat/completions`.
        decoder_id: engine that answered.
        prefill_engine_id: prefiller that was called for this turn, None when none was.
        migrated: whether this turn moved KV from a prefiller to the decoder.
        hops: HTTP requests to engines, failed ones included.
        failovers: 1 when another decoder had to be taken before the first byte.
        loss: empty, or why something was lost (`prefill_failed`, `transfer_failed`, `broker_unavailable`, ...).
        held: whether the decoder was asked to keep this turn's blocks.
        ttft_ms: arrival of the turn to its first token; None when none came.
        ttfet_ms: arrival of the first turn of the tool loop (lease wait included) to the first token of this turn;
            only of a turn that ended without tool calls, else None.
        tbt_us: times between tokens in microseconds, at most `TBT_SAMPLES_MAX`; empty unless streamed.
        lease_wait_ms: time spent waiting for the broker.
        prefill_ms: duration of the prefill call, None when there was none.
        duration_ms: arrival to the last byte.
        prompt_tokens, completion_tokens, cached_tokens: the engine's `usage`, 0 when it gave none.
        finish_reason: the engine's word for it, empty when the turn did not finish.
        error: empty, or the class of failure that ended the turn.
    """

    conversation_id: ConversationId
    lineage: LineageId
    lease_id: LeaseId | None = None
    epoch: int = 0
    turn: int = 1
    first_turn: bool = False
    mode: Literal["migrate", "local"] | None = None
    model: str = ""
    path: str = ""
    decoder_id: EngineId | None = None
    prefill_engine_id: EngineId | None = None
    migrated: bool = False
    hops: int = 0
    failovers: int = 0
    loss: str = ""
    held: bool = False
    ttft_ms: int | None = None
    ttfet_ms: int | None = None
    tbt_us: tuple[int, ...] = ()
    lease_wait_ms: int = 0
    prefill_ms: int | None = None
    duration_ms: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = ""
    error: str = ""


class TurnHook(Protocol):
    """Anything that can be called with a finished turn."""

    def __call__(self, record: TurnRecord, /) -> None:
        """Take note of a turn that ended, well or not."""
        ...


class LoggingHook:
    """The default hook: one line per turn on the logger `conserve_sdk.turn`.

    Good turns at DEBUG, a loss (a fallback, a failover) at INFO, an error at WARNING.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("conserve_sdk.turn")

    def __call__(self, record: TurnRecord, /) -> None:
        """Log the record."""
        level = logging.WARNING if record.error else logging.INFO if record.loss else logging.DEBUG
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "turn_finished %s", _as_fields(record))


class TurnCollector:
    """A hook that keeps every record, for demos and tests. Thread-safe; memory grows with the turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[TurnRecord] = []

    def __call__(self, record: TurnRecord, /) -> None:
        """Keep the record."""
        with self._lock:
            self._records.append(record)

    @property
    def records(self) -> tuple[TurnRecord, ...]:
        """All records so far, in the order in which the turns ended."""
        with self._lock:
            return tuple(self._records)

    def clear(self) -> None:
        """Forget all records."""
        with self._lock:
            self._records.clear()

    def ttft_ms(self, percent: float) -> float | None:
        """Return that percentile of the times to first token, None without any."""
        return percentile((r.ttft_ms for r in self.records if r.ttft_ms is not None), percent)

    def ttfet_ms(self, percent: float) -> float | None:
        """Return that percentile of the times to first effective token, None without any."""
        return percentile((r.ttfet_ms for r in self.records if r.ttfet_ms is not None), percent)

    def tbt_ms(self, percent: float) -> float | None:
        """Return that percentile over all times between tokens, None without any."""
        microseconds = percentile((gap for r in self.records for gap in r.tbt_us), percent)
        return None if microseconds is None else microseconds / 1000


def percentile(values: Iterable[float], percent: float) -> float | None:
    """Return the nearest-rank percentile: the smallest value with at least `percent` % of all at or under it.

    Args:
        values: the sample; may be empty.
        percent: 0 to 100.

    Returns:
        A member of the sample, or None when it is empty.
    """
    ordered: Sequence[float] = sorted(values)
    if not ordered:
        return None
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[min(max(rank, 1), len(ordered)) - 1]


def _as_fields(record: TurnRecord) -> str:
    shown = {
        "conversation_id": record.conversation_id,
        "lineage": record.lineage,
        "turn": record.turn,
        "lease_id": record.lease_id,
        "decoder_id": record.decoder_id,
        "prefill_engine_id": record.prefill_engine_id,
        "mode": record.mode,
        "ttft_ms": record.ttft_ms,
        "ttfet_ms": record.ttfet_ms,
        "duration_ms": record.duration_ms,
        "lease_wait_ms": record.lease_wait_ms,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "finish_reason": record.finish_reason,
        "loss": record.loss,
        "error": record.error,
    }
    return " ".join(f"{name}={value}" for name, value in shown.items() if value not in (None, ""))

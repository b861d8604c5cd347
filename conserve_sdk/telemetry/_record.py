"""What the SDK tells about a turn that ended, and the percentile that is used over many of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from conserve_sdk.core._quick import quick_init
from conserve_sdk.core.units import ConversationId, EngineId, LeaseId, LineageId

__all__ = ["TBT_OBSERVED_MAX", "TBT_SAMPLES_MAX", "TurnHook", "TurnRecord", "observed_gaps", "percentile"]

TBT_SAMPLES_MAX = 4096
"""Times between tokens kept per turn; a longer answer keeps its first ones."""

TBT_OBSERVED_MAX = 128
"""Times between tokens that a metric takes from one turn: an observation costs 12 us of CPU in OpenTelemetry's SDK 1.45
(1 us in prometheus-client), at the end of a turn whose answer may have had thousands of tokens."""


@quick_init
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
        streamed: whether the answer came as a stream of events.
        response_id, response_model: the engine's names of the answer and of the model that gave it; may be empty.
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
    streamed: bool = False
    response_id: str = ""
    response_model: str = ""
    finish_reason: str = ""
    error: str = ""


class TurnHook(Protocol):
    """Anything that can be called with a finished turn."""

    def __call__(self, record: TurnRecord, /) -> None:
        """Take note of a turn that ended, well or not."""
        ...


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


def observed_gaps(record: TurnRecord) -> tuple[int, ...]:
    """The turn's times between tokens for a metric: all, or every n-th, so that at most `TBT_OBSERVED_MAX` are left."""
    step = -(-len(record.tbt_us) // TBT_OBSERVED_MAX)
    return record.tbt_us[:: max(step, 1)]

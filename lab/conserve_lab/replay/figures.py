"""The figures of a replay, under the keys that every report of live runs uses."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from conserve_lab.replay.samples import ConversationSample
from conserve_sdk.telemetry import percentile

Figures = dict[str, Any]


def latencies(conversations: Sequence[ConversationSample]) -> Figures:
    """Return counts, TTFT, TTFET and times between tokens, in milliseconds."""
    turns = [turn for conversation in conversations for turn in conversation.turns]
    answered = [turn for turn in turns if turn.done_s is not None]
    return {
        "conversations": len(conversations),
        "turns": len(turns),
        "failed_turns": sum(1 for turn in turns if turn.failures),
        "failed_attempts": sum(len(turn.failures) for turn in turns),
        "given_up_conversations": sum(conversation.given_up for conversation in conversations),
        "prompt_tokens": sum(turn.prompt_tokens for turn in answered),
        "output_tokens": sum(turn.completion_tokens for turn in answered),
        "ttft_ms": _percentiles(turn.ttft_ms for turn in answered),
        "first_turn_ttft_ms": _percentiles(turn.ttft_ms for turn in answered if turn.turn == 1),
        "follow_up_ttft_ms": _percentiles(turn.ttft_ms for turn in answered if turn.turn > 1),
        "ttfet_ms": _percentiles(conversation.ttfet_ms for conversation in conversations),
        "tbt_ms": _percentiles(gap / 1000 for turn in answered for gap in turn.token_gaps_us),
        "last_turn_tbt_ms": _percentiles(gap / 1000 for turn in answered if turn.last for gap in turn.token_gaps_us),
    }


def spread_of(values: Sequence[float], *, digits: int = 1) -> dict[str, float | int]:
    """Return how many values there are, their median, and their ends."""
    return {
        "n": len(values),
        "min": round(min(values), digits),
        "p50": round(statistics.median(values), digits),
        "max": round(max(values), digits),
    }


def _percentiles(values: Iterable[float | None]) -> dict[str, float | None]:
    sample = [value for value in values if value is not None]
    found = {f"p{percent}": percentile(sample, percent) for percent in (50, 95, 99)}
    return {name: None if value is None else round(value, 2) for name, value in found.items()}

"""What a run is summed up to, under the names that reports use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from conserve_lab.simulator.agent import Story
from conserve_lab.simulator.fleet import BLOCK_SIZE
from conserve_lab.simulator.isolated import isolated_ttfet_us
from conserve_lab.simulator.run import Outcome

ISOLATED_CHUNK = 8_192
SLO_TIMES = 5
"""The paper's objective: five times the conversation's own isolated value."""


def summarise(outcome: Outcome) -> dict[str, Any]:
    """Return the figures of a run; times from arrival unless named `artifact`, normalised ones over isolated.

    `artifact` counts TTFET as the paper's published code does: from admission, the prefillers' queues left out.
    """
    kind = outcome.engines[-1].kind
    alone = [
        isolated_ttfet_us(conversation, kind, chunk_tokens=ISOLATED_CHUNK, block_size=BLOCK_SIZE)
        for conversation in outcome.conversations
    ]
    arrival = [story.first_tokens_us[-1] - story.arrived_us for story in outcome.stories]
    artifact = [story.first_tokens_us[-1] - story.granted_us - story.prefill_queue_us for story in outcome.stories]
    norm = _ratios(arrival, alone)
    output = sum(turn.output_tokens for conversation in outcome.conversations for turn in conversation.turns)
    seen = output + sum(
        conversation.prompt_tokens(number)
        for conversation in outcome.conversations
        for number in range(len(conversation.turns))
    )
    joules = outcome.energy_nj / 1e9
    return {
        "conversations": len(outcome.stories),
        "span_s": _s(outcome.span_us),
        "ttfet_p50_norm": round(_percentile(norm, 50), 3),
        "ttfet_p95_norm": round(_percentile(norm, 95), 3),
        "ttfet_p95_s": _s(_percentile(arrival, 95)),
        "artifact_ttfet_p95_norm": round(_percentile(_ratios(artifact, alone), 95), 3),
        "slo_violations": round(sum(ratio > SLO_TIMES for ratio in norm) / len(norm), 4),
        "ttft_first_p95_s": _s(_percentile(_ttfts(outcome.stories, first=True), 95)),
        "ttft_later_p95_s": _s(_percentile(_ttfts(outcome.stories, first=False), 95)),
        "tbt_p95_ms": _ms(outcome.last_gaps.percentile_us(95)),
        "tbt_p99_ms": _ms(outcome.last_gaps.percentile_us(99)),
        "tbt_p999_ms": _ms(outcome.last_gaps.percentile_us(99.9)),
        "queue_wait_p95_ms": _ms(
            round(_percentile([story.granted_us - story.arrived_us for story in outcome.stories], 95))
        ),
        "joules_per_output_token": round(joules / output, 3),
        "tokens_per_joule": round(seen / joules, 3),
        "kilojoules": round(joules / 1000, 1),
        "reprefilled_tokens": sum(story.reprefilled_tokens for story in outcome.stories),
        "moved_tokens": outcome.moved_tokens,
        "migrations": sum(story.migrations for story in outcome.stories),
    }


def _ttfts(stories: Sequence[Story], *, first: bool) -> list[int]:
    spans = [
        [token - turn for token, turn in zip(story.first_tokens_us, story.turns_us, strict=True)] for story in stories
    ]
    return [span for each in spans for span in (each[:1] if first else each[1:])] or [0]


def _ratios(measured: Sequence[int], alone: Sequence[int]) -> list[float]:
    return [value / yardstick for value, yardstick in zip(measured, alone, strict=True)]


def _percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[max(math.ceil(percent / 100 * len(ordered)), 1) - 1]


def _s(value_us: float) -> float:
    return round(value_us / 1e6, 3)


def _ms(value_us: int | None) -> float | None:
    return None if value_us is None else round(value_us / 1000, 2)

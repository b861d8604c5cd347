"""What a run is summed up to, under the names that reports use."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from conserve_lab.simulator.agent import Story
from conserve_lab.simulator.fleet import BLOCK_SIZE
from conserve_lab.simulator.isolated import isolated
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
        isolated(conversation, kind, chunk_tokens=ISOLATED_CHUNK, block_size=BLOCK_SIZE)
        for conversation in outcome.conversations
    ]
    ttfet = [yardstick.ttfet_us for yardstick in alone]
    e2e = [yardstick.e2e_us for yardstick in alone]
    arrival = [story.first_tokens_us[-1] - story.arrived_us for story in outcome.stories]
    # What the published code leaves out: the wait for admission, and the queues of the prefillers.
    hidden = [story.granted_us - story.arrived_us + story.prefill_queue_us for story in outcome.stories]
    artifact = [span - left_out for span, left_out in zip(arrival, hidden, strict=True)]
    whole = [story.done_us - story.arrived_us for story in outcome.stories]
    artifact_whole = [span - left_out for span, left_out in zip(whole, hidden, strict=True)]
    norm = _ratios(arrival, ttfet)
    tbt_p95_us = outcome.last_gaps.percentile_us(95)
    alone_tbt_us = statistics.median(yardstick.tbt_us for yardstick in alone)
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
        "ttfet_gmean_norm": round(statistics.geometric_mean(norm), 3),
        "artifact_ttfet_p95_norm": round(_percentile(_ratios(artifact, ttfet), 95), 3),
        "artifact_ttfet_gmean_norm": round(statistics.geometric_mean(_ratios(artifact, ttfet)), 3),
        "e2e_p95_norm": round(_percentile(_ratios(whole, e2e), 95), 3),
        "artifact_e2e_p95_norm": round(_percentile(_ratios(artifact_whole, e2e), 95), 3),
        "tbt_p95_norm": None if tbt_p95_us is None else round(tbt_p95_us / alone_tbt_us, 3),
        "slo_violations": round(sum(ratio > SLO_TIMES for ratio in norm) / len(norm), 4),
        "ttft_first_p95_s": _s(_percentile(_ttfts(outcome.stories, first=True), 95)),
        "ttft_later_p95_s": _s(_percentile(_ttfts(outcome.stories, first=False), 95)),
        "tbt_p95_ms": _ms(tbt_p95_us),
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
        "lost_calls": sum(story.lost_calls for story in outcome.stories),
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

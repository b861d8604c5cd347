"""Makes workloads of a known shape, for machines without traces. Seeded; the same seed gives the same conversations.

The shapes follow published statistics, their medians and 90th percentiles: SWE-bench runs padded to long first
prompts (eicchen/conserve), coding agents with real tool outputs (SWE-agent, LMCache's mini-swe-agent runs, TraceLab),
customer service with one shared system prompt (tau-bench), giant tool outputs (BFCL long context), people who
chat (Mooncake), and slow tools.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from conserve_lab.workloads.conversation import Conversation, Turn, WorkloadError


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A log-normal quantity: its median, and the factor from there to the 90th percentile; clipped at `most`."""

    median: float
    p90_factor: float = 1.0
    most: int = 100_000

    def draw(self, source: random.Random) -> int:
        """One value, at least 1."""
        sigma = math.log(self.p90_factor) / 1.2816
        return min(max(round(self.median * math.exp(source.gauss(0.0, sigma))), 1), self.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A family of conversations.

    Attributes:
        turns: the fewest, the most usual and the most.
        rare: what some appends are instead, each with its share of all appends.
        gap_ms: tool or human time between two turns, None without.
    """

    about: str
    turns: tuple[int, int, int]
    first: Spread
    append: Spread
    output: Spread
    shared_tokens: int = 0
    rare: tuple[tuple[float, Spread], ...] = ()
    gap_ms: Spread | None = None


_ANSWER = Spread(median=121, p90_factor=4.0, most=10_000)
_SHORT_ANSWER = Spread(median=56, p90_factor=3.2, most=600)

SHAPES: dict[str, Shape] = {
    "swe-padded": Shape(
        about="long unshared first prompt, tiny constant appends, no tool time (the paper's workload)",
        turns=(5, 5, 5),
        first=Spread(median=15_890, p90_factor=1.07),
        append=Spread(median=67),
        output=_ANSWER,
    ),
    "coding": Shape(
        about="short first prompt, appends with a heavy tail, quick tools (SWE-agent)",
        turns=(4, 8, 37),
        first=Spread(median=2_100, p90_factor=1.2),
        append=Spread(median=251, p90_factor=6.0, most=40_000),
        output=Spread(median=85, p90_factor=4.0, most=1_600),
        shared_tokens=1_034,
        gap_ms=Spread(median=150, p90_factor=6.0, most=60_000),
    ),
    "mini-swe": Shape(
        about="many turns, mostly tiny appends, a second per tool (LMCache's mini-swe-agent runs)",
        turns=(6, 12, 30),
        first=Spread(median=1_540, p90_factor=1.9),
        append=Spread(median=40, p90_factor=16.0, most=4_200),
        output=Spread(median=108, p90_factor=2.3, most=450),
        gap_ms=Spread(median=1_070, p90_factor=1.9, most=5_000),
    ),
    "deep-coding": Shape(
        about="one long shared preamble, large appends, many turns (TraceLab)",
        turns=(4, 10, 41),
        first=Spread(median=17_600, p90_factor=1.23),
        append=Spread(median=896, p90_factor=5.75, most=60_000),
        output=Spread(median=156, p90_factor=3.1, most=4_000),
        shared_tokens=16_000,
        gap_ms=Spread(median=550, p90_factor=8.0, most=120_000),
    ),
    "service": Shape(
        about="one system prompt shared by all, small appends (tau-bench)",
        turns=(5, 9, 23),
        first=Spread(median=4_035, p90_factor=1.005),
        append=Spread(median=36, p90_factor=11.0, most=3_600),
        output=_SHORT_ANSWER,
        shared_tokens=4_000,
    ),
    "giant-appends": Shape(
        about="shared prompt, short appends but for a few of 2 000 and of 31 000 tokens (BFCL long context)",
        turns=(5, 10, 14),
        first=Spread(median=3_980, p90_factor=1.19),
        append=Spread(median=30, p90_factor=2.0),
        output=Spread(median=36, p90_factor=1.8, most=1_300),
        shared_tokens=2_780,
        rare=((0.013, Spread(median=31_672)), (0.12, Spread(median=1_800, p90_factor=1.2))),
    ),
    "chat": Shape(
        about="people: few turns, long and uneven prompts, minutes between turns (Mooncake)",
        turns=(1, 1, 3),
        first=Spread(median=6_000, p90_factor=4.4, most=90_000),
        append=Spread(median=26, p90_factor=40.0, most=20_000),
        output=Spread(median=350, p90_factor=1.7, most=2_000),
        shared_tokens=512,
        gap_ms=Spread(median=123_000, p90_factor=3.5, most=650_000),
    ),
    "idle-tools": Shape(
        about="long first prompt, ten turns, tools of 20 seconds",
        turns=(10, 10, 10),
        first=Spread(median=15_890, p90_factor=1.07),
        append=Spread(median=67),
        output=_ANSWER,
        gap_ms=Spread(median=20_000, p90_factor=2.5, most=300_000),
    ),
}


def generate(shape_name: str, *, conversations: int, seed: int) -> tuple[Conversation, ...]:
    """Make `conversations` conversations of a shape.

    Raises:
        WorkloadError: there is no shape of that name.
    """
    shape = SHAPES.get(shape_name)
    if shape is None:
        raise WorkloadError(f"no workload {shape_name!r}: choose one of {', '.join(SHAPES)}, or give a file")
    source = random.Random(f"{shape_name} {seed}")  # noqa: S311 -- a workload, not a secret
    return tuple(_draw(shape, source, f"{shape_name}-{number:05d}") for number in range(conversations))


def _draw(shape: Shape, source: random.Random, name: str) -> Conversation:
    turns = []
    fewest, usual, most = shape.turns
    for number in range(round(source.triangular(fewest, most, usual))):
        append = (_append(shape, source) if number else shape.first).draw(source)
        output = shape.output.draw(source)
        gap_us = shape.gap_ms.draw(source) * 1000 if shape.gap_ms else 0
        turns.append(Turn(append_tokens=append, output_tokens=output, gap_us=gap_us))
    shared = min(shape.shared_tokens, turns[0].append_tokens)
    return Conversation(conversation_id=name, turns=tuple(turns), shared_tokens=shared)


def _append(shape: Shape, source: random.Random) -> Spread:
    place = source.random()
    for share, spread in shape.rare:
        if place < share:
            return spread
        place -= share
    return shape.append

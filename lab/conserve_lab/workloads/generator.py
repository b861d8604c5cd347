"""Makes workloads of a known shape, for machines without traces. Seeded; the same seed gives the same conversations.

The shapes follow published statistics of agents: SWE-bench runs padded to long first prompts (eicchen/conserve), coding
agents with real tool outputs (TraceLab, SWE-agent), customer service with one shared system prompt (tau-bench), giant
tool outputs (BFCL multi-turn long context), and slow tools.
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
        turns: how many, both ends included.
        giant_share: share of appends that are `giant` instead.
        gap_ms: tool time between two turns, None without.
    """

    about: str
    turns: tuple[int, int]
    first: Spread
    append: Spread
    output: Spread
    shared_tokens: int = 0
    giant_share: float = 0.0
    giant: Spread = Spread(median=31_000, p90_factor=1.02)
    gap_ms: Spread | None = None


_ANSWER = Spread(median=121, p90_factor=4.0, most=10_000)
_SHORT_ANSWER = Spread(median=56, p90_factor=3.2, most=600)

SHAPES: dict[str, Shape] = {
    "swe-padded": Shape(
        about="long unshared first prompt, tiny constant appends, no tool time (the paper's workload)",
        turns=(5, 5),
        first=Spread(median=15_890, p90_factor=1.07),
        append=Spread(median=67),
        output=_ANSWER,
    ),
    "coding": Shape(
        about="short first prompt, many turns, appends with a heavy tail, quick tools",
        turns=(12, 40),
        first=Spread(median=2_150, p90_factor=1.2),
        append=Spread(median=251, p90_factor=6.0, most=40_000),
        output=Spread(median=85, p90_factor=4.0, most=1_600),
        shared_tokens=1_034,
        gap_ms=Spread(median=150, p90_factor=6.0, most=60_000),
    ),
    "service": Shape(
        about="one system prompt shared by all, small appends",
        turns=(8, 25),
        first=Spread(median=4_035, p90_factor=1.002),
        append=Spread(median=36, p90_factor=11.0, most=3_600),
        output=_SHORT_ANSWER,
        shared_tokens=4_000,
    ),
    "giant-appends": Shape(
        about="shared prompt, one append in fourteen brings 31 000 tokens",
        turns=(8, 14),
        first=Spread(median=3_748, p90_factor=1.2),
        append=Spread(median=34, p90_factor=2.0),
        output=Spread(median=36, p90_factor=2.0, most=1_300),
        shared_tokens=3_500,
        giant_share=0.07,
    ),
    "idle-tools": Shape(
        about="long first prompt, ten turns, tools of 20 seconds",
        turns=(10, 10),
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
    for number in range(source.randint(*shape.turns)):
        giant = number > 0 and source.random() < shape.giant_share
        spread = shape.first if number == 0 else shape.giant if giant else shape.append
        append = spread.draw(source)
        output = shape.output.draw(source)
        gap_us = shape.gap_ms.draw(source) * 1000 if shape.gap_ms else 0
        turns.append(Turn(append_tokens=append, output_tokens=output, gap_us=gap_us))
    shared = min(shape.shared_tokens, turns[0].append_tokens)
    return Conversation(conversation_id=name, turns=tuple(turns), shared_tokens=shared)

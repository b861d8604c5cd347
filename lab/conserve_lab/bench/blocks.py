"""Blocks of turns, one arm after another, again and again: what the machine does meanwhile happens to all of them.

A block is one conversation. Its first turn is timed apart: it is the one that may cost a broker call and a prefill.
Time is wall time per turn; CPU is that of this process (all threads, background reports included) per turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from conserve_lab.bench.arms import Arm

__all__ = ["Block", "Load", "median_difference", "play", "spread_of", "stream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every arm is given.

    Attributes:
        turns: follow-up turns per block.
        prompt_chars: length of the first message; every later one adds a line.
        answer_tokens: of a follow-up's answer.
        chunks: of a streamed answer.
    """

    model: str
    turns: int
    prompt_chars: int = 6_000
    answer_tokens: int = 8
    chunks: int = 200


@dataclass(slots=True)
class Block:
    """One block's figures, in milliseconds and microseconds."""

    first_ms: float = 0.0
    follow_up_ms: list[float] = field(default_factory=list)
    cpu_us_per_turn: float = 0.0
    other_cpu_us_per_turn: float = 0.0

    @property
    def p50_ms(self) -> float:
        """Median time of a follow-up turn."""
        return statistics.median(self.follow_up_ms)


def play(arm: Arm, load: Load, *, number: int) -> Block:
    """One conversation: its first turn, then its follow-ups."""
    name = f"{arm.name.replace(' ', '-')}-{number}"
    messages: list[Any] = [{"role": "user", "content": _prompt(str(number), load)}]
    block = Block()
    with arm.inside(name):
        block.first_ms = _turn(arm, load, name, messages)
        arm.settle()
        cpu_ns, other_s = time.process_time_ns(), arm.other_cpu_s()
        block.follow_up_ms = [_turn(arm, load, name, messages) for _ in range(load.turns)]
        arm.settle()
    block.cpu_us_per_turn = (time.process_time_ns() - cpu_ns) / 1000 / load.turns
    block.other_cpu_us_per_turn = (arm.other_cpu_s() - other_s) * 1_000_000 / load.turns
    arm.leave(name)
    return block


def _prompt(opening: str, load: Load) -> str:
    return f"{opening} {'lorem ipsum ' * load.prompt_chars}"[: load.prompt_chars]


def _turn(arm: Arm, load: Load, name: str, messages: list[Any]) -> float:
    started_s = time.perf_counter()
    answer = arm.create(model=load.model, messages=messages, max_tokens=load.answer_tokens, **arm.options(name))
    took_ms = (time.perf_counter() - started_s) * 1000
    messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
    messages.append({"role": "user", "content": "And what follows from that?"})
    return took_ms


def stream(arm: Arm, load: Load, *, number: int) -> float:
    """One streamed answer of `load.chunks` tokens in a conversation that has had its first turn; chunks per second."""
    name = f"{arm.name.replace(' ', '-')}-stream"
    messages: list[Any] = [{"role": "user", "content": _prompt("stream", load)}]
    with arm.inside(name):
        if not number:
            _turn(arm, load, name, messages)
        started_s = time.perf_counter()
        answer = arm.create(
            model=load.model, messages=messages[:1], max_tokens=load.chunks, stream=True, **arm.options(name)
        )
        chunks = arm.count(answer)
        return chunks / (time.perf_counter() - started_s)


def median_difference(ours: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the pairs of blocks that ran next to each other."""
    return statistics.median(mine - its for mine, its in zip(ours, reference, strict=True))


def spread_of(values: Sequence[float], *, digits: int = 3) -> dict[str, float | int]:
    """Lowest, quartiles, highest, and how many."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "n": len(values),
        "min": round(min(values), digits),
        "p25": round(low, digits),
        "p50": round(middle, digits),
        "p75": round(high, digits),
        "max": round(max(values), digits),
    }

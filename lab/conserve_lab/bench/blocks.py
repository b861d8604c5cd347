"""Blocks of turns, a turn of each arm in turn: what the machine does meanwhile happens to all of them.

A block is one conversation of each arm. Its first turn is timed apart: it is the one that may cost a broker call and a
prefill. Turns that stood side by side are compared with each other; what an arm does beside its turns is added to it.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from conserve_lab.bench.arms import Arm, connections_made

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
    """What one conversation cost.

    Attributes:
        first_ms, follow_up_ms: wall time of its turns.
        cpu_us: CPU of the thread that made the follow-up turns, each.
        background_us: CPU spent for them elsewhere: reports, a router.
        connections: made for all its turns.
    """

    first_ms: float = 0.0
    follow_up_ms: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    background_us: float = 0.0
    connections: int = 0

    @property
    def background_us_per_turn(self) -> float:
        """CPU of other threads and processes that work for the arm alone."""
        return self.background_us / len(self.cpu_us)


def play(arms: Sequence[Arm], load: Load, *, number: int) -> list[Block]:
    """One conversation of each arm, a turn of each in turn."""
    with connections_made() as made:
        talks = [_Talk(arm, load, made, number=number) for arm in arms]
        for talk in talks:
            talk.begin()
        background_ns = -_background_ns()
        for turn in range(load.turns):
            for talk in talks if turn % 2 else talks[::-1]:  # being first is no advantage
                talk.follow_up()
        for talk in talks:
            talk.settle()
        background_ns += _background_ns()
        foreign = sum(thread != threading.get_ident() for _, thread in made)
    sharing = sum(talk.arm.in_background for talk in talks)
    for talk in talks:
        talk.end()
        if talk.arm.in_background:  # threads cannot tell whom they report for; each has reported the same turns
            talk.block.background_us += background_ns / 1_000 / sharing
            talk.block.connections += foreign
    return [talk.block for talk in talks]


class _Talk:
    """One conversation of an arm, and what it costs."""

    def __init__(self, arm: Arm, load: Load, made: Sequence[tuple[Any, int]], *, number: int) -> None:
        self.arm, self.block = arm, Block()
        self._load, self._made = load, made
        self._name = f"{arm.name.replace(' ', '-')}-{number}"
        self._messages: list[Any] = [{"role": "user", "content": _prompt(str(number), load)}]

    def begin(self) -> None:
        before = len(self._made)
        with self.arm.inside(self._name):
            self.block.first_ms = _turn(self.arm, self._load, self._name, self._messages)
        self.arm.settle()
        self._count(before)
        self._other_s = self.arm.other_cpu_s()

    def follow_up(self) -> None:
        before, cpu_ns = len(self._made), time.thread_time_ns()
        with self.arm.inside(self._name):
            self.block.follow_up_ms.append(_turn(self.arm, self._load, self._name, self._messages))
        self.block.cpu_us.append((time.thread_time_ns() - cpu_ns) / 1_000)
        self._count(before)

    def settle(self) -> None:
        cpu_ns = time.thread_time_ns()
        self.arm.settle()
        self.block.background_us += (time.thread_time_ns() - cpu_ns) / 1_000

    def end(self) -> None:
        self.block.background_us += (self.arm.other_cpu_s() - self._other_s) * 1_000_000
        self.arm.leave(self._name)

    def _count(self, before: int) -> None:
        self.block.connections += sum(thread == threading.get_ident() for _, thread in self._made[before:])


def _background_ns() -> int:
    """CPU time of all threads of this process but the calling one."""
    return time.process_time_ns() - time.thread_time_ns()


def _prompt(opening: str, load: Load) -> str:
    return f"{opening} {'lorem ipsum ' * load.prompt_chars}"[: load.prompt_chars]


def _turn(arm: Arm, load: Load, name: str, messages: list[Any]) -> float:
    started_s = time.perf_counter()
    answer = arm.create(model=load.model, messages=messages, max_tokens=load.answer_tokens, **arm.options(name))
    took_ms = (time.perf_counter() - started_s) * 1000
    messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
    messages.append({"role": "user", "content": "And what follows from that?"})
    return took_ms


def stream(arm: Arm, load: Load, *, number: int) -> tuple[float, float]:
    """One streamed answer of `load.chunks` tokens in a conversation that has had its first turn.

    Returns:
        Chunks per second, and microseconds of the reading thread's CPU per chunk.
    """
    name = f"{arm.name.replace(' ', '-')}-stream"
    messages: list[Any] = [{"role": "user", "content": _prompt("stream", load)}]
    with arm.inside(name):
        if not number:
            _turn(arm, load, name, messages)
        started_s, cpu_ns = time.perf_counter(), time.thread_time_ns()
        answer = arm.create(
            model=load.model, messages=messages[:1], max_tokens=load.chunks, stream=True, **arm.options(name)
        )
        chunks = arm.count(answer)
        return chunks / (time.perf_counter() - started_s), (time.thread_time_ns() - cpu_ns) / 1_000 / chunks


def median_difference(ours: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the pairs that ran next to each other."""
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

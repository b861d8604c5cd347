"""Many decode steps at once: while nothing but decodes runs, each step differs from the last by one token a sequence.

A leap does exactly what as many single steps would do, block for block and microsecond for microsecond (a property
test holds the two against each other), only without looking at every sequence in every step. A simulator lives on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from conserve_lab.engine_model.sequence import Sequence as EngineSequence


class StepClock(Protocol):
    """The cost model, as far as decodes go."""

    def step_us(self, *, decodes: int, context_tokens: int, prefill_tokens: int) -> int:
        """Return the microseconds of a step."""
        ...


@dataclass(frozen=True, slots=True)
class Leap:
    """What a leap did: one token of every request at the end of each step."""

    durations_us: tuple[int, ...]
    request_ids: tuple[str, ...]
    context_tokens: int
    """KV that the first of the steps read."""

    @property
    def duration_us(self) -> int:
        """All steps together."""
        return sum(self.durations_us)


def steps_without_end(running: Sequence[EngineSequence]) -> int:
    """Return how many steps it takes until just before the first of these decodes emits its last token."""
    return min(sequence.request.output_tokens - sequence.emitted for sequence in running) - 1


def steps_within_blocks(running: Sequence[EngineSequence], steps: int, *, free: int, block_size: int) -> int:
    """Return how many of `steps` steps the free blocks allow."""

    def needed(count: int) -> int:
        return sum(max(0, -(-(sequence.computed + count) // block_size) - len(sequence.blocks)) for sequence in running)

    if needed(steps) <= free:
        return steps
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= free else (low, middle - 1)
    return low


def step_durations(
    cost: StepClock, running: Sequence[EngineSequence], steps: int, *, now_us: int, until_us: int
) -> tuple[int, ...]:
    """Return the lengths of up to `steps` steps, the last of which begins before `until_us`."""
    context = sum(sequence.computed for sequence in running)
    durations: list[int] = []
    while len(durations) < steps and now_us < until_us:
        duration_us = cost.step_us(decodes=len(running), context_tokens=context, prefill_tokens=0)
        durations.append(duration_us)
        now_us += duration_us
        context += len(running)
    return tuple(durations)


def block_events(
    running: Sequence[EngineSequence], steps: int, *, block_size: int
) -> Iterator[tuple[int, bool, EngineSequence]]:
    """Yield (step, full, sequence) in the order in which single steps would take and fill blocks.

    In each step first everyone who needs a block takes one, then those who filled one offer it to the prefix cache.
    """
    events: list[tuple[int, bool, int]] = []
    for index, sequence in enumerate(running):
        first_full = block_size - sequence.computed % block_size
        events += [(step, True, index) for step in range(first_full, steps + 1, block_size)]
        # The block that token number `len(blocks) * block_size` (from 0) goes into is the first one missing.
        first_take = max(len(sequence.blocks) * block_size - sequence.computed, 0) + 1
        events += [(step, False, index) for step in range(first_take, steps + 1, block_size)]
    for step, full, index in sorted(events):
        yield step, full, running[index]

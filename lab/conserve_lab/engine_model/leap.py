"""Many decode steps at once: while nothing but decodes runs, each step differs from the last by one token a sequence.

A leap does exactly what as many single steps would do, block for block and microsecond for microsecond (a property
test holds the two against each other), only without looking at every sequence in every step. A simulator lives on it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from conserve_lab.engine_model.sequence import Sequence as EngineSequence


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

    def before(self, span_us: int) -> Leap:
        """The same, without the steps that begin `span_us` after its start or later."""
        ends = list(accumulate(self.durations_us))
        steps = bisect_left(ends, span_us) + 1
        return self if steps >= len(ends) else Leap(self.durations_us[:steps], self.request_ids, self.context_tokens)


def steps_without_end(running: Sequence[EngineSequence]) -> int:
    """Return how many steps it takes until just before the first of these decodes emits its last token."""
    return min([sequence.request.output_tokens - sequence.emitted for sequence in running]) - 1


def steps_within_blocks(running: Sequence[EngineSequence], steps: int, *, free: int, block_size: int) -> int:
    """Return how many of `steps` steps the free blocks allow."""

    def needed(count: int) -> int:
        return sum(max(0, -(-(sequence.computed + count) // block_size) - len(sequence.blocks)) for sequence in running)

    if len(running) * (steps // block_size + 1) <= free or needed(steps) <= free:  # the first one is quick to tell
        return steps
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= free else (low, middle - 1)
    return low


def block_events(
    running: Sequence[EngineSequence], steps: int, *, block_size: int
) -> Iterator[tuple[int, bool, EngineSequence]]:
    """Yield (step, full, sequence) in the order in which single steps would take and fill blocks.

    In each step first everyone who needs a block takes one, then those who filled one offer it to the prefix cache.
    """
    events: list[tuple[int, bool, int]] = []
    for index, sequence in enumerate(running):
        first_full = block_size - sequence.computed % block_size
        if first_full <= steps:
            events += [(step, True, index) for step in range(first_full, steps + 1, block_size)]
        # The block that token number `len(blocks) * block_size` (from 0) goes into is the first one missing.
        first_take = max(len(sequence.blocks) * block_size - sequence.computed, 0) + 1
        if first_take <= steps:
            events += [(step, False, index) for step in range(first_take, steps + 1, block_size)]
    for step, full, index in sorted(events):
        yield step, full, running[index]

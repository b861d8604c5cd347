"""The requests that wait for a place in the batch, in the order in which vLLM takes them."""

from __future__ import annotations

import bisect
from collections import deque

from conserve_lab.engine_model.sequence import Sequence


class Waiting:
    """First in, first out; or by priority, then by arrival (vLLM: `--scheduling-policy`).

    Args:
        by_priority: whether priorities count.
    """

    def __init__(self, *, by_priority: bool) -> None:
        self._by_priority = by_priority
        self._line: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._line)

    @property
    def first(self) -> Sequence:
        """Whoever is next."""
        return self._line[0]

    def rank(self, sequence: Sequence) -> tuple[int, int]:
        """Lower ones are taken first, and preempted last."""
        return sequence.request.priority if self._by_priority else 0, sequence.order

    def add(self, sequence: Sequence, *, again: bool = False) -> None:
        """Let a sequence wait; one that was in the batch already goes first, unless priorities decide."""
        if self._by_priority:
            bisect.insort(self._line, sequence, key=self.rank)
        elif again:
            self._line.appendleft(sequence)
        else:
            self._line.append(sequence)

    def take(self) -> Sequence:
        """Remove and return whoever is next."""
        return self._line.popleft()

    def remove(self, sequence: Sequence) -> None:
        """It does not wait any more."""
        self._line.remove(sequence)

"""Free blocks in the order of their eviction, a conversation's at once: a context of 16 000 tokens has a thousand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, KeysView, Sequence


class FreeRuns:
    """Runs of blocks that became free together, the first one longest ago.

    A run lies in the order of its tokens and is evicted from its end, so whoever comes back for it finds its beginning.

    Args:
        blocks: how many there are, all of them free, the first one to be taken first.
    """

    def __init__(self, blocks: int) -> None:
        self._runs: OrderedDict[int, list[int]] = OrderedDict()
        self._number_of: dict[int, int] = {}
        """Of a run, by its first block."""
        self._added = 0
        self._blocks = 0
        self.append(range(blocks - 1, -1, -1))

    def __len__(self) -> int:
        return self._blocks

    def __iter__(self) -> Iterator[int]:
        """The blocks, in the order in which they are evicted."""
        return (block for run in self._runs.values() for block in reversed(run))

    def runs(self) -> Iterator[Sequence[int]]:
        """The runs, the one to be evicted first in front."""
        return iter(self._runs.values())

    def run_from(self, block: int) -> list[int] | None:
        """The run that begins with this block; None if none does."""
        number = self._number_of.get(block)
        return None if number is None else self._runs[number]

    @property
    def starts(self) -> KeysView[int]:
        """The first blocks of all runs."""
        return self._number_of.keys()

    def append(self, blocks: Sequence[int]) -> None:
        """Blocks became free, the last of them first."""
        self._added += 1
        assert blocks[0] not in self._number_of, f"block {blocks[0]} released once too often"
        self._number_of[blocks[0]] = self._added
        self._runs[self._added] = list(blocks)
        self._blocks += len(blocks)

    def take(self, first: int, count: int) -> None:
        """The leading blocks of the run that begins with `first` are free no more; the rest stays in its place."""
        number = self._number_of.pop(first)
        rest = self._runs[number][count:]
        self._blocks -= count
        if rest:
            self._runs[number] = rest
            self._number_of[rest[0]] = number
        else:
            del self._runs[number]

    def evict(self, count: int) -> list[int]:
        """Take the blocks that are free for longest; there must be as many."""
        self._blocks -= count
        taken: list[int] = []
        while count:
            number, run = next(iter(self._runs.items()))
            if len(run) > count:
                taken += run[: -count - 1 : -1]
                del run[-count:]
                break
            taken += run[::-1]
            count -= len(run)
            del self._runs[number], self._number_of[run[0]]
        return taken

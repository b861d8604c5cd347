"""Blocks of KV cache: reference counts, prefix cache, least recently used eviction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum, auto
from itertools import chain, repeat

from conserve_lab.engine_model.free_runs import FreeRuns
from conserve_lab.engine_model.shared_spans import SharedSpans

_ABSENT = -1
_FEW = 8
"""More blocks than these are looked at together."""


class _Held(Enum):
    """By whom a stretch of blocks is referenced."""

    NOBODY = auto()
    ONE = auto()
    SEVERAL = auto()


class BlockPool:
    """A fixed number of blocks, each free or referenced, each possibly cached under a key.

    A block nobody references stays cached until its place is needed, as in vLLM's block pool
    (vllm/v1/core/block_pool.py): eviction takes the block that was freed longest ago.

    Blocks are hardly ever looked at one by one. Equal keys mean equal history, so the key before a key is always the
    same, and what is found under leading keys lies in the same order everywhere: in the blocks of whoever computed it,
    in a run that became free, in a span that several share.

    Args:
        blocks: How many blocks there are.
    """

    def __init__(self, blocks: int) -> None:
        self._total = blocks
        self._free = FreeRuns(blocks)
        self._shared = SharedSpans()
        self._keyless: set[int] = set()
        """Blocks whose content another one has under the key."""
        self._seams: set[int] = set()
        """Blocks with a key behind one without, which begin a stretch: who finds them comes from another block."""
        self._block_of: dict[int, int] = {}
        self._key_of: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Number of blocks in the pool."""
        return self._total

    @property
    def free(self) -> int:
        """Blocks nobody references; cached ones among them count, for they can be evicted."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks somebody references."""
        return self._total - len(self._free)

    def lookup(self, keys: Sequence[int], *, most: int | None = None) -> list[int]:
        """Return the cached blocks of the longest leading run of `keys`, at most so many, without referencing them."""
        found: list[int] = []
        at, end = 0, len(keys) if most is None else min(most, len(keys))
        while at < end:
            block = self._block_of.get(keys[at])
            if block is None:
                break
            stretch = self._shared.span_from(block) or self._free.run_from(block)
            if stretch is None:
                return found + self._one_by_one(keys[at:end])
            count = self._cached(stretch, keys, at, end)
            found += stretch if count == len(stretch) else stretch[:count]
            at += count
        return found

    def _one_by_one(self, keys: Sequence[int]) -> list[int]:
        found = [block if block is not None else _ABSENT for block in map(self._block_of.get, keys)]
        return found[: found.index(_ABSENT)] if _ABSENT in found else found

    def _cached(self, stretch: Sequence[int], keys: Sequence[int], at: int, end: int) -> int:
        """How many leading blocks of a stretch, at least one, are those of `keys` from `at` to `end`.

        Where one is, all before it are, so that it takes few looks, and mostly one.
        """
        block_of = self._block_of
        low, high = 1, min(len(stretch), end - at)
        middle = high
        while low < high:
            same = block_of.get(keys[at + middle - 1]) == stretch[middle - 1]
            low, high = (middle, high) if same else (low, middle - 1)
            middle = (low + high + 1) // 2
        return low

    def affords(self, hits: Sequence[int], new: int) -> bool:
        """Whether there are enough free blocks to reference `hits` and allocate `new` more."""
        free = len(self._free)
        return new + len(hits) <= free or (new <= free and self.cost_of(hits, new) <= free)

    def cost_of(self, hits: Sequence[int], new: int) -> int:
        """Return how many free blocks it takes to reference `hits` and allocate `new` more."""
        return new + sum(count for held, _, count in self._stretches(hits) if held is _Held.NOBODY)

    def reference(self, hits: Sequence[int]) -> None:
        """Add one reference to each block that `lookup` found, taking it out of the free ones."""
        for held, at, count in list(self._stretches(hits)):
            if held is _Held.NOBODY:
                self._free.take(hits[at], count)
            elif held is _Held.SEVERAL:
                self._shared.join(hits[at], count)
            else:
                self._shared.add(list(hits[at : at + count]))

    def _stretches(self, hits: Sequence[int]) -> Iterator[tuple[_Held, int, int]]:
        """Yield by whom stretches of what `lookup` found are held, where they begin, and how many blocks they have."""
        at = 0
        while at < len(hits):
            span, run = self._shared.span_from(hits[at]), self._free.run_from(hits[at])
            if span is not None:
                held, count = _Held.SEVERAL, _common(span, hits, at)
            elif run is not None:
                held, count = _Held.NOBODY, _common(run, hits, at)
            else:
                held, count = _Held.ONE, self._until_another(hits[at:])
            yield held, at, count
            at += count

    def _until_another(self, hits: Sequence[int]) -> int:
        """How many leading blocks of these are held by the one sequence that holds the first."""
        starts = (self._shared.starts, self._free.starts, self._seams)
        if all(each.isdisjoint(hits[1:]) for each in starts):
            return len(hits)
        return next(at for at in range(1, len(hits)) if any(hits[at] in each for each in starts))

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, evicting the least recently used; None (and no change) if too few are free."""
        if count > len(self._free):
            return None
        taken = self._free.evict(count)
        keys = [key for key in map(self._key_of.pop, taken, repeat(None)) if key is not None]
        for key in keys:
            del self._block_of[key]
        if self._keyless or self._seams:
            self._keyless.difference_update(taken)
            self._seams.difference_update(taken)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block of one sequence, its tail first so that its tail is evicted first."""
        at, end = 0, len(blocks)
        if self._seams and not self._seams.isdisjoint(blocks):
            for run in reversed(self._apart(blocks)):
                self._free.append(run)
            return
        while at < end and self._shared.span_from(blocks[at]) is not None:
            at += self._shared.leave(blocks[at])
        if at < end:
            self._free.append(blocks[at:])

    def _apart(self, blocks: Sequence[int]) -> list[list[int]]:
        """The runs that become free with these blocks, cut at the seams."""
        runs: list[list[int]] = [[]]
        at = 0
        while at < len(blocks):
            if self._shared.span_from(blocks[at]) is not None:
                at += self._shared.leave(blocks[at])
                runs.append([])
                continue
            if blocks[at] in self._seams:
                runs.append([])
            runs[-1].append(blocks[at])
            at += 1
        return [run for run in runs if run]

    def publish(self, blocks: Sequence[int], keys: Sequence[int], *, behind: int | None = None) -> None:
        """Make computed blocks findable, each under its key; the first block of a key wins, as in vLLM.

        Args:
            blocks: the blocks.
            keys: as many.
            behind: the block that comes before them in their sequence; None: they are its first.
        """
        block_of, key_of = self._block_of, self._key_of
        if len(keys) > _FEW and behind not in self._keyless and self._all_new(blocks, keys):
            block_of.update(zip(keys, blocks, strict=True))
            key_of.update(zip(blocks, keys, strict=True))
            return
        for block, key in zip(blocks, keys, strict=True):
            if key in block_of or block in key_of:
                self._keyless.add(block)
            else:
                block_of[key] = block
                key_of[block] = key
                if behind in self._keyless:
                    self._seams.add(block)
            behind = block

    def _all_new(self, blocks: Sequence[int], keys: Sequence[int]) -> bool:
        return self._block_of.keys().isdisjoint(keys) and self._key_of.keys().isdisjoint(blocks)

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert that references equal what `owners` hold, that no block is lost, and what runs and spans stand on.

        Args:
            owners: The block lists of everyone who should hold references.
        """
        owned = Counter(chain.from_iterable(owners))
        shared = list(self._shared.references())
        assert len(shared) == len(dict(shared))
        assert {block: times for block, times in owned.items() if times > 1} == dict(shared), (
            "reference counts differ from what sequences and holds own"
        )
        free = list(self._free)
        assert len(free) == len(self._free)
        assert sorted([*free, *owned]) == list(range(self._total)), "a block is both free and referenced, or neither"
        assert {key: block for block, key in self._key_of.items()} == self._block_of
        for run in self._free.runs():
            keyed = [block in self._key_of for block in run]
            assert keyed == sorted(keyed, reverse=True), "a cached block behind one that is not, in one run"


def _common(stretch: Sequence[int], hits: Sequence[int], at: int) -> int:
    """How many leading blocks of a stretch stand in `hits`, from place `at` on."""
    most = min(len(stretch), len(hits) - at)
    if stretch[:most] == hits[at : at + most]:
        return most
    return next(count for count in range(most) if stretch[count] != hits[at + count])

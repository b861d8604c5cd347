"""Blocks of KV cache: reference counts, prefix cache, least recently used eviction."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain

_ABSENT = -1


class BlockPool:
    """A fixed number of blocks, each free or referenced, each possibly cached under a key.

    A block nobody references stays cached until its place is needed, as in vLLM's block pool
    (vllm/v1/core/block_pool.py): eviction takes the block that was freed longest ago.

    Args:
        blocks: How many blocks there are.
    """

    def __init__(self, blocks: int) -> None:
        self._references = [0] * blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._block_of: dict[int, int] = {}
        self._key_of: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Number of blocks in the pool."""
        return len(self._references)

    @property
    def free(self) -> int:
        """Blocks nobody references; cached ones among them count, for they can be evicted."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks somebody references."""
        return self.total - self.free

    def lookup(self, keys: Sequence[int]) -> list[int]:
        """Return the cached blocks of the longest leading run of `keys`, without referencing them."""
        if not keys or keys[0] not in self._block_of:
            return []
        found = [block if block is not None else _ABSENT for block in map(self._block_of.get, keys)]
        return found[: found.index(_ABSENT)] if _ABSENT in found else found

    def cost_of(self, hits: Sequence[int], new: int) -> int:
        """Return how many free blocks it takes to reference `hits` and allocate `new` more."""
        return new + [self._references[block] for block in hits].count(0)

    def reference(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block, taking it out of the free list."""
        references, free = self._references, self._free
        for block in blocks:
            if references[block] == 0:
                del free[block]
            references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, evicting the least recently used; None (and no change) if too few are free."""
        if count > len(self._free):
            return None
        taken: list[int] = []
        references, key_of, take = self._references, self._key_of, self._free.popitem
        for _ in range(count):
            block, _ = take(last=False)
            key = key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
            references[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block of one sequence, its tail first so that its tail is evicted first."""
        references, free = self._references, self._free
        for block in reversed(blocks):
            left = references[block] - 1
            assert left >= 0, f"block {block} released once too often"
            references[block] = left
            if left == 0:
                free[block] = None

    def publish(self, blocks: Sequence[int], keys: Sequence[int]) -> None:
        """Make computed blocks findable, each under its key; the first block of a key wins, as in vLLM."""
        block_of, key_of = self._block_of, self._key_of
        for block, key in zip(blocks, keys, strict=True):
            if key not in block_of and block not in key_of:
                block_of[key] = block
                key_of[block] = key

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert that references equal what `owners` hold and that no block is lost.

        Args:
            owners: The block lists of everyone who should hold references.
        """
        owned = Counter(chain.from_iterable(owners))
        expected = [owned[block] for block in range(self.total)] if owned else [0] * self.total
        assert expected == self._references, "reference counts differ from what sequences and holds own"
        unowned = {block for block, references in enumerate(self._references) if not references}
        assert unowned == self._free.keys(), "a block is both free and referenced, or neither"
        assert {key: block for block, key in self._key_of.items()} == self._block_of

"""KV blocks in the host's memory: what the GPU evicted comes back by a copy instead of a recomputation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class HostTier:
    """Copies of computed blocks by key, least recently used first out (vLLM: `OffloadingConnector`).

    Every full block is copied when it is computed; the copy costs the engine no time, reading it back does.

    Args:
        blocks: how many fit; 0: there is no host tier.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._keys: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def put(self, keys: Sequence[int]) -> None:
        """Keep blocks, or note that they were used again."""
        kept = self._keys
        for key in keys:
            if key in kept:
                kept.move_to_end(key)
            else:
                kept[key] = None
        while len(kept) > self._blocks:
            kept.popitem(last=False)

    def leading(self, keys: Sequence[int], *, start: int) -> int:
        """Return how many of `keys`, from position `start` on, are here without a gap."""
        found = 0
        for index in range(start, len(keys)):
            if keys[index] not in self._keys:
                break
            self._keys.move_to_end(keys[index])
            found += 1
        return found

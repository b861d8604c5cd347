"""KV blocks in the host's memory: what the GPU evicted comes back by a copy instead of a recomputation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

_FEW = 8
"""More blocks than these are looked at together."""


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
        if len(keys) > _FEW and kept.keys().isdisjoint(keys):
            kept.update(dict.fromkeys(keys))
        else:
            for key in keys:
                kept[key] = None
                kept.move_to_end(key)
        while len(kept) > self._blocks:
            kept.popitem(last=False)

    def leading(self, keys: Sequence[int], *, start: int, end: int) -> int:
        """Return how many of `keys`, from position `start` on and before `end`, are here without a gap."""
        keys = keys[start:end]
        here = list(map(self._keys.__contains__, keys))
        found = here.index(False) if False in here else len(here)
        for key in keys[:found]:
            self._keys.move_to_end(key)
        return found

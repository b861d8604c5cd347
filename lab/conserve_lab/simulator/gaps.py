"""Times between tokens, counted by length: millions of them in a few thousand entries, and exact percentiles."""

from __future__ import annotations

import math
from collections import Counter


class Gaps:
    """A multiset of times in microseconds."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, gap_us: int, times: int = 1) -> None:
        """Count one length."""
        self._counts[gap_us] += times

    def __len__(self) -> int:
        return self._counts.total()

    def percentile_us(self, percent: float) -> int | None:
        """Return the nearest-rank percentile, None when empty."""
        total = len(self)
        rank = max(math.ceil(percent / 100 * total), 1)
        for gap_us in sorted(self._counts):
            rank -= self._counts[gap_us]
            if rank <= 0:
                return gap_us
        return None

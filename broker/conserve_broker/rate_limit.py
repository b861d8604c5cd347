"""A token bucket: so many requests at once, and so many a second from then on."""

from __future__ import annotations

__all__ = ["TokenBucket"]


class TokenBucket:
    """Full at the start. The clock is the caller's, in seconds, and never goes backwards.

    Args:
        rate_per_s: what flows in; above 0.
        burst: what it holds at most; at least 1.
        now_s: when it is made.
    """

    __slots__ = ("_at_s", "_level", "burst", "rate_per_s")

    def __init__(self, *, rate_per_s: float, burst: int, now_s: float) -> None:
        self.rate_per_s = rate_per_s
        self.burst = burst
        self._level = float(burst)
        self._at_s = now_s

    def take(self, now_s: float) -> float:
        """Take one; returns 0 when there was one, else in how many seconds there will be (nothing is taken)."""
        self._level = min(self.burst, self._level + (now_s - self._at_s) * self.rate_per_s)
        self._at_s = now_s
        if self._level >= 1.0:
            self._level -= 1.0
            return 0.0
        return (1.0 - self._level) / self.rate_per_s

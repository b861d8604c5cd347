"""The broker's clock: Unix milliseconds that never go backwards, as the core demands."""

from __future__ import annotations

import time
from collections.abc import Callable

from conserve_sdk.core.units import Ms

__all__ = ["BrokerClock"]


class BrokerClock:
    """Wall time, held still while the system clock is set back.

    Wall time and not a monotonic clock, because instants are written to the journal and into tokens and must mean
    the same after a restart and on another machine.

    Args:
        time_ns: Unix time in nanoseconds; replaced in tests.
    """

    def __init__(self, time_ns: Callable[[], int] = time.time_ns) -> None:
        self._time_ns = time_ns
        self._latest_ms = 0

    def now_ms(self) -> Ms:
        """The present instant, never before the one returned last."""
        self._latest_ms = max(self._latest_ms, self._time_ns() // 1_000_000)
        return Ms(self._latest_ms)

    def not_before(self, at_ms: Ms) -> None:
        """Never again return an instant before this one (the latest that the journal knows)."""
        self._latest_ms = max(self._latest_ms, at_ms)

"""The broker's clock: Unix milliseconds that never go backwards, as the core demands; and whether a loop hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from conserve_sdk.core.units import Ms

__all__ = ["BrokerClock", "ResponsiveLoop"]


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


class ResponsiveLoop:
    """Knows whether an event loop still comes round, by asking it to from another thread.

    Args:
        ask: puts a callback into the loop, from any thread (`loop.call_soon_threadsafe`).
        patience_s: how long it may take to come round.
    """

    def __init__(self, ask: Callable[[Callable[[], None]], object], *, patience_s: float = 10.0) -> None:
        self._ask = ask
        self._patience_s = patience_s
        self._answered = threading.Event()
        self._answered.set()
        self._asked_s = time.monotonic()

    def responds(self) -> bool:
        """False once the loop let the whole patience pass without an answer. Called again and again, by one thread."""
        if self._answered.is_set():
            self._answered.clear()
            self._asked_s = time.monotonic()
            try:
                self._ask(self._answered.set)
            except RuntimeError:  # the loop is closed
                return False
            return True
        return time.monotonic() - self._asked_s < self._patience_s

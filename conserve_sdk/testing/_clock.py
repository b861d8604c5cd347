"""A clock that moves only when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable

from conserve_sdk.core.units import Ms

START_MS = 1_700_000_000_000
"""Where a fake clock starts unless told otherwise: an ordinary Unix time, so that no code meets a zero by accident."""


class FakeClock:
    """Time under a test's control. Thread-safe.

    Args:
        start_ms: the first instant, in Unix milliseconds.
    """

    def __init__(self, start_ms: int = START_MS) -> None:
        self._lock = threading.Lock()
        self._now_ms = start_ms
        self._listeners: list[Callable[[], None]] = []

    def now_ms(self) -> Ms:
        """The present instant."""
        with self._lock:
            return Ms(self._now_ms)

    def monotonic_s(self) -> float:
        """The present instant in seconds, for code that takes a `time.monotonic`."""
        return self.now_ms() / 1000

    def monotonic_us(self) -> int:
        """The present instant in microseconds: what `ConServe` takes as `clock_us`."""
        return self.now_ms() * 1000

    def advance(self, ms: int) -> Ms:
        """Let `ms` milliseconds pass, then tell everyone who listens. Returns the new instant.

        Raises:
            ValueError: `ms` is negative; time does not go back.
        """
        if ms < 0:
            raise ValueError(f"a clock cannot advance by {ms} ms")
        with self._lock:
            self._now_ms += ms
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()
        return self.now_ms()

    def on_advance(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every advance, in the thread that advances."""
        with self._lock:
            self._listeners.append(listener)

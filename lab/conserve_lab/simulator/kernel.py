"""Virtual time: a heap of things to do."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Timer:
    """One thing to do; `cancel` it before it is due, or not at all."""

    __slots__ = ("action", "at_us")

    def __init__(self, at_us: int, action: Callable[[], None] | None) -> None:
        self.at_us = at_us
        self.action = action

    def cancel(self) -> None:
        """Do not do it."""
        self.action = None


class Kernel:
    """Does things at their instants, in the order in which they were asked for where those are equal."""

    def __init__(self) -> None:
        self.now_us = 0
        self._heap: list[tuple[int, int, Timer]] = []
        self._count = 0

    def at(self, at_us: int, action: Callable[[], None]) -> Timer:
        """Do `action` at `at_us`, which must not lie in the past."""
        assert at_us >= self.now_us, f"{at_us} lies before {self.now_us}"
        timer = Timer(at_us, action)
        self._count += 1
        heapq.heappush(self._heap, (at_us, self._count, timer))
        return timer

    def after(self, delay_us: int, action: Callable[[], None]) -> Timer:
        """Do `action` `delay_us` from now."""
        return self.at(self.now_us + delay_us, action)

    def step(self) -> bool:
        """Do the next thing; False when there is none."""
        while self._heap:
            at_us, _, timer = heapq.heappop(self._heap)
            if timer.action is not None:
                self.now_us = at_us
                timer.action()
                return True
        return False

"""One object per event loop, closed when its loop ends: connections belong to the loop that made them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from conserve_sdk._fork import call_in_forked_child

__all__ = ["PerLoop"]


T = TypeVar("T")


@dataclass(slots=True)
class _Held(Generic[T]):
    thing: T
    farewell: AsyncGenerator[None, None] | None = None


class PerLoop(Generic[T]):
    """Thread-safe. A forked child has none of its parent's.

    Args:
        make: makes a loop's object, in that loop, when it is asked for first.
        close: closes it, in that loop.
    """

    def __init__(self, make: Callable[[], T], *, close: Callable[[T], Awaitable[None]]) -> None:
        self._make, self._close = make, close
        self._forget()
        call_in_forked_child(self._forget)

    def __len__(self) -> int:
        return len(self._loops)

    def here(self) -> T | None:
        """The running loop's object, if it has one."""
        held = self._loops.get(asyncio.get_running_loop())
        return None if held is None else held.thing

    async def get(self) -> T:
        """The running loop's object; makes it if need be."""
        loop = asyncio.get_running_loop()
        with self._lock:
            held = self._loops.get(loop)
            if held is not None:
                return held.thing
            gone = [each for each in self._loops if each.is_closed()]
            left = [self._loops.pop(each) for each in gone]
            held = self._loops[loop] = _Held(self._make())
        left.clear()  # outside the lock: loops that were closed without a farewell leave their sockets to the collector
        held.farewell = self._close_with_loop(held)
        await anext(held.farewell)
        return held.thing

    async def aclose(self) -> None:
        """Close the running loop's object; the next `get` makes another one."""
        with self._lock:
            held = self._loops.pop(asyncio.get_running_loop(), None)
        if held is not None and held.farewell is not None:
            await held.farewell.aclose()

    async def _close_with_loop(self, held: _Held[T]) -> AsyncGenerator[None, None]:
        """Closes the object when its loop ends: `asyncio.run` closes every async generator that is still open.

        And lets go of it: a generator knows its loop, so the loop would live as long as its entry here.
        """
        try:
            yield
        finally:
            loop = asyncio.get_running_loop()
            with self._lock:
                if self._loops.get(loop) is held:
                    del self._loops[loop]
            await self._close(held.thing)

    def _forget(self) -> None:
        # Not closed: the sockets are the parent's, and closing TLS would speak on them.
        self._lock = threading.Lock()
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Held[T]] = WeakKeyDictionary()

"""How many calls of one event loop to the broker are begun side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import httpx2

__all__ = ["Starts"]

AT_ONCE = 64
STARTED_S = 0.25
"""A call that may wait for admission and has not been answered for so long is under way: the broker lets it wait."""


class Starts:
    """Lets in as many calls as one loop gets through while their timeouts run; the others wait, and theirs do not.

    Thousands of coroutines may want a lease in the same instant: a batch of agents starts, or a broker comes back under
    all of them. Begun together, each takes its share of the loop's only thread, so that all of them take longer
    than any of them may; they are given up together, and begun together again.

    Belongs to the loop it is used in first.
    """

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(AT_ONCE)

    @asynccontextmanager
    async def one(self, *, within_s: float, may_wait: bool) -> AsyncIterator[None]:
        """Begin one call in this block.

        Args:
            within_s: how long to wait for one's turn.
            may_wait: whether the broker may keep the call waiting for admission; others must not wait behind it.

        Raises:
            httpx2.PoolTimeout: it was not our turn in time.
        """
        await self._take(within_s)
        place = _Place(self._free)
        timer = asyncio.get_running_loop().call_later(STARTED_S, place.leave) if may_wait else None
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            place.leave()

    async def _take(self, within_s: float) -> None:
        try:
            with anyio.fail_after(within_s if self._free.locked() else None):
                await self._free.acquire()
        except TimeoutError as error:
            raise httpx2.PoolTimeout(f"{AT_ONCE} other calls of this process came first all the time") from error


class _Place:
    """Taken once, and left once."""

    def __init__(self, free: asyncio.Semaphore) -> None:
        self._free: asyncio.Semaphore | None = free

    def leave(self) -> None:
        free, self._free = self._free, None
        if free is not None:
            free.release()

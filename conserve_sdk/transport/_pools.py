"""Connections to the engines: one pool per process for blocking code, one per event loop for async code."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import httpx2

from conserve_sdk._fork import call_in_forked_child
from conserve_sdk._http import AsyncHTTPTransport
from conserve_sdk._tls import verify_for

__all__ = ["AsyncEnginePool", "EnginePool"]

LIMITS = httpx2.Limits(max_connections=1_000, max_keepalive_connections=200, keepalive_expiry=4.0)
"""An idle connection is given up before uvicorn (and so vLLM) closes it after 5 s: whoever closes first wins nothing,
but a request sent at that very moment would fail."""


class EnginePool(httpx2.BaseTransport):
    """Thread-safe; opens connections when they are needed, and none of the parent's in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[str, httpx2.HTTPTransport] = {}
        call_in_forked_child(self._forget)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request."""
        return self._pool(request.url.scheme).handle_request(request)

    def close(self) -> None:
        """Close all connections; the next request opens new ones."""
        with self._lock:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.close()

    def _pool(self, scheme: str) -> httpx2.HTTPTransport:
        with self._lock:
            pool = self._pools.get(scheme)
            if pool is None:
                # A pool per scheme: the one for plain HTTP needs no TLS context and never sees an https URL.
                pool = httpx2.HTTPTransport(verify=verify_for([f"{scheme}:"]), limits=LIMITS)
                self._pools[scheme] = pool
            return pool

    def _forget(self) -> None:
        # Not closed: the sockets are the parent's, and closing TLS would speak on them.
        self._lock = threading.Lock()
        self._pools = {}


@dataclass(slots=True)
class _LoopPools:
    """The pools of one event loop."""

    pools: dict[str, AsyncHTTPTransport]
    farewell: AsyncGenerator[None, None] | None = None


class AsyncEnginePool(httpx2.AsyncBaseTransport):
    """Usable from several event loops, one after another or at once, each with connections of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopPools] = WeakKeyDictionary()
        call_in_forked_child(self._forget)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request."""
        return await (await self._pool(request.url.scheme)).handle_async_request(request)

    async def aclose(self) -> None:
        """Close the running loop's connections; the next request opens new ones."""
        with self._lock:
            mine = self._loops.pop(asyncio.get_running_loop(), None)
        if mine is not None and mine.farewell is not None:
            await mine.farewell.aclose()

    async def _pool(self, scheme: str) -> AsyncHTTPTransport:
        loop = asyncio.get_running_loop()
        with self._lock:
            mine = self._loops.get(loop)
            fresh = mine is None
            mine = mine or self._loops.setdefault(loop, _LoopPools({}))
            pool = mine.pools.get(scheme)
            if pool is None:
                pool = AsyncHTTPTransport(verify=verify_for([f"{scheme}:"]), limits=LIMITS)
                mine.pools[scheme] = pool
        if fresh:
            mine.farewell = self._close_with_loop(mine)
            await anext(mine.farewell)
        return pool

    async def _close_with_loop(self, mine: _LoopPools) -> AsyncGenerator[None, None]:
        """Closes the pools when its loop ends: `asyncio.run` closes every async generator that is still open.

        And lets go of them: a generator knows its loop, so the loop would live as long as its entry here.
        """
        try:
            yield
        finally:
            loop = asyncio.get_running_loop()
            with self._lock:
                if self._loops.get(loop) is mine:
                    del self._loops[loop]
            for pool in mine.pools.values():
                await pool.aclose()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._loops = WeakKeyDictionary()

"""Connections to the engines: one pool per process for blocking code, one per event loop for async code."""

from __future__ import annotations

import threading

import httpx2

from conserve_sdk._fork import call_in_forked_child
from conserve_sdk._http import AsyncHTTPTransport
from conserve_sdk._http1 import AsyncHttp1Transport, Http1Transport, is_plain
from conserve_sdk._loops import PerLoop
from conserve_sdk._tls import verify_for

__all__ = ["AsyncEnginePool", "EnginePool"]

LIMITS = httpx2.Limits(max_connections=1_000, max_keepalive_connections=200, keepalive_expiry=4.0)
"""An idle connection is given up before uvicorn (and so vLLM) closes it after 5 s: whoever closes first wins nothing,
but a request sent at that very moment would fail."""


class EnginePool(httpx2.BaseTransport):
    """Thread-safe; opens connections when they are needed, and none of the parent's in a forked child."""

    _lock: threading.Lock
    _pools: dict[str, httpx2.HTTPTransport]
    _plain: Http1Transport

    def __init__(self) -> None:
        self._forget()
        call_in_forked_child(self._forget)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; its body must be in memory."""
        if is_plain(request):
            return self._plain.handle_request(request)
        return self._pool(request.url.scheme).handle_request(request)

    def close(self) -> None:
        """Close all connections; the next request opens new ones."""
        with self._lock:
            pools, self._pools = self._pools, {}
            plain, self._plain = self._plain, Http1Transport(limits=LIMITS)
        plain.close()
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
        self._plain = Http1Transport(limits=LIMITS)


class AsyncEnginePool(httpx2.AsyncBaseTransport):
    """Usable from several event loops, one after another or at once, each with connections of its own."""

    def __init__(self) -> None:
        self._loops = PerLoop(_LoopPools, close=_LoopPools.aclose)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; its body must be in memory."""
        pools = self._loops.here() or await self._loops.get()
        if is_plain(request):
            return await pools.plain.handle_async_request(request)
        return await pools.pool(request.url.scheme).handle_async_request(request)

    async def aclose(self) -> None:
        """Close the running loop's connections; the next request opens new ones."""
        await self._loops.aclose()


class _LoopPools:
    """The pools of one event loop."""

    def __init__(self) -> None:
        self._pools: dict[str, AsyncHTTPTransport] = {}
        self.plain = AsyncHttp1Transport(limits=LIMITS)

    def pool(self, scheme: str) -> AsyncHTTPTransport:
        pool = self._pools.get(scheme)
        if pool is None:
            pool = self._pools[scheme] = AsyncHTTPTransport(verify=verify_for([f"{scheme}:"]), limits=LIMITS)
        return pool

    async def aclose(self) -> None:
        await self.plain.aclose()
        for pool in self._pools.values():
            await pool.aclose()

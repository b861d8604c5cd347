"""Connections to one engine, which is asked one thing at a time."""

from __future__ import annotations

import ssl
from collections.abc import Callable

import httpx2

from conserve_sdk._http1 import AsyncHttp1Transport, is_plain

__all__ = ["EngineConnections"]

_LIMITS = httpx2.Limits(max_connections=1, keepalive_expiry=5.0)


class EngineConnections(httpx2.AsyncBaseTransport):
    """A transport for one engine; its pool is its own, since a pool looks at all its connections for each request.

    In the clear it goes over the SDK's plain HTTP/1.1, with which a poll costs a third less; TLS is httpx2's. Proxies
    of the environment have no business between broker and engines.

    Args:
        tls_context: makes, or returns again, what TLS needs; called when the first https URL is asked.
    """

    def __init__(self, tls_context: Callable[[], ssl.SSLContext]) -> None:
        self._tls_context = tls_context
        self._plain = AsyncHttp1Transport(limits=_LIMITS)
        self._tls: httpx2.AsyncHTTPTransport | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; its body must be in memory."""
        if is_plain(request):
            return await self._plain.handle_async_request(request)
        if self._tls is None:
            self._tls = httpx2.AsyncHTTPTransport(verify=self._tls_context(), trust_env=False, limits=_LIMITS)
        return await self._tls.handle_async_request(request)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._plain.aclose()
        if self._tls is not None:
            await self._tls.aclose()

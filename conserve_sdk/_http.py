"""The async HTTP transport that every async connection of the SDK goes through."""

from __future__ import annotations

import httpx2

__all__ = ["AsyncHTTPTransport"]


class AsyncHTTPTransport(httpx2.AsyncHTTPTransport):
    """`httpx2.AsyncHTTPTransport` that keeps to its own errors when a peer dies while it is being connected to.

    A connection that is lost between being made and being looked at has no socket any more; anyio 4 then raises a bare
    `AttributeError` (uvloop) or `OSError` (asyncio) from `getpeername`, which httpcore2 2.16 lets through. Nothing was
    sent by then.
    """

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request.

        Raises:
            httpx2.TransportError: it could not be sent or was not answered.
        """
        try:
            return await super().handle_async_request(request)
        except (AttributeError, OSError) as error:
            raise httpx2.ConnectError(f"the connection was lost as it was made ({error})", request=request) from error

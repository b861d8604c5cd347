"""HTTP pieces: server-sent events and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from conserve_lab.emulator.errors import ApiError

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):  # noqa: N818  (an event, not an error)
    """The client closed its connection before the answer was complete."""


def dump_json(document: object) -> bytes:
    """Return compact JSON."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")


def sse(document: object, *, event: str = "") -> bytes:
    """Return one server-sent event."""
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + dump_json(document) + b"\n\n"


def error_response(error: ApiError) -> Response:
    """Return an error in vLLM's shape."""
    return JSONResponse(error.body(), status_code=error.status)


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work unless the client goes away first; the request's body must have been read.

    Raises:
        ClientGone: It did; the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for item in (task, gone):
            item.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """A streamed answer that ends its work as soon as the client leaves.

    Args:
        events: The encoded events.
        finish: Called exactly once when the stream ends, however it ends.
        drop_after: Lose the connection after this many events (a fault), or None.
        drop: Loses the connection of a request.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        finish: Callable[[], None],
        drop_after: int | None,
        drop: Callable[[Scope], None],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._finish = finish
        self._drop_after = drop_after
        self._drop = drop
        self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await until_gone(receive, self._send_all(scope, send))
        except ClientGone:
            return
        finally:
            self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._finish()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sent = 0
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                if sent == self._drop_after:
                    break
                await send({"type": "http.response.body", "body": event, "more_body": True})
                sent += 1
        if self._drop_after is not None:
            self._drop(scope)
            raise ClientGone
        self._end()  # first, so that who has read all of it finds its record
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

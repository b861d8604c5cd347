"""Uvicorn's HTTP/1.1 with bounds: heads of so many bytes, requests that arrive in time, so many connections.

Uvicorn itself keeps whatever head a client sends and waits for a request for as long as single bytes of it trickle in.
What comes in one piece, as nearly all requests do, costs nothing here: timers run only while a request is incomplete.
"""

from __future__ import annotations

import asyncio
from asyncio.events import TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from conserve_broker._connections import Connections, client_of
from conserve_sdk.protocol import PROBLEM_MEDIA_TYPE, Problem

__all__ = ["HEAD_BYTES_MAX", "bounded_protocol"]

HEAD_BYTES_MAX = 32 * 1024
"""Request line and headers together; a lease token has 4 KiB at most, an API key 256 bytes."""
HEADERS_MAX = 100
_PHRASES = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


def bounded_protocol(*, request_timeout_s: float, connections: Connections) -> type[asyncio.Protocol]:
    """The protocol class to hand to uvicorn.

    Args:
        request_timeout_s: from a request's first byte to its last, and from a connection to its first request.
        connections: those beyond its bounds are closed at once.
    """

    class Bounded(_Bounded):
        timeout_s = request_timeout_s
        bounds = connections

    return Bounded


class _TooLargeError(Exception):
    """Ends the parsing of a head; httptools hands it back as its own error."""


class _Bounded(HttpToolsProtocol):
    """See the module.

    Its state, per connection: whether a head has begun and is not complete (`_in_head`), the same of the whole message
    (`_incomplete`), and whether a message was completed by the piece of data that is being read (`_ended`).
    """

    timeout_s: float
    bounds: Connections
    cycle: RequestResponseCycle | None  # type: ignore[assignment]  # None before the first request, as uvicorn knows

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head = self._incomplete = self._ended = self._refused = False
        self._head_bytes = 0
        self._timer: TimerHandle | None = None
        self._client: bytes | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        client = client_of(transport.get_extra_info("peername"))
        if self.bounds.enter(client):
            self._client = client
            self._arm()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._client is not None:
            self.bounds.leave(self._client)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        in_head = self._in_head
        self._begin_piece()
        super().data_received(data)
        if self._is_over():
            return
        if self._in_head:
            self._head_bytes += len(data) if in_head else 0  # what a first piece may bring is bounded by the read
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse_head()
        if self._incomplete or not self._ended:  # not ended: blank lines before a request, which may go on for ever
            self._arm()

    def _begin_piece(self) -> None:
        self._ended = False

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._incomplete = self._in_head = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        if self._head_is_large():
            raise _TooLargeError
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._incomplete, self._ended = False, True
        self._disarm()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """The parser gave up; see `data_received` of the base class."""
        if self._in_head and self._head_is_large():
            self._refuse_head()
        else:
            self._refuse(400, "bad_request", "Not HTTP", msg)

    def _is_over(self) -> bool:
        return self._refused or self.transport.is_closing()

    def _head_is_large(self) -> bool:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        return size > HEAD_BYTES_MAX or len(self.headers) > HEADERS_MAX

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse_head(self) -> None:
        detail = f"request line and headers exceed {HEAD_BYTES_MAX} bytes or {HEADERS_MAX} headers"
        self._refuse(431, "head_too_large", "Request head too large", detail)

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.timeout_s, self._too_slow)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.pipeline or (self._is_answering() and (self._in_head or not self._incomplete)):
            self._arm()  # an earlier request waits for its answer: what comes after it must not end that
        elif not self._incomplete:
            self.transport.close()  # a connection without a request
        else:
            detail = f"the request was not complete after {self.timeout_s:g} s"
            self._refuse(408, "request_timeout", "Request too slow", detail)

    def _refuse(self, status: int, code: str, title: str, detail: str) -> None:
        """Answer unless an answer is under way already, and close."""
        self._refused = True
        self._disarm()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = Problem(title=title, status=status, detail=detail, code=code).model_dump_json().encode()
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: %s\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
                % (status, _PHRASES[status], PROBLEM_MEDIA_TYPE.encode(), len(body), body)
            )
        self.transport.close()

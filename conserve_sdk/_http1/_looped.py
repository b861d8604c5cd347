"""The async transport, over the event loop's own transports."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import cast

import anyio
import httpx2

from conserve_sdk._http1._answer import AnswerReader
from conserve_sdk._http1._idle import IdleConnections
from conserve_sdk._http1._request import Limits, Origin, limits_of, origin_of, wire_form

__all__ = ["AsyncHttp1Transport"]

_UNBOUNDED = 1_000_000
WAITING_BYTES_MAX = 262_144
"""Of a body that nobody takes: then the peer has to wait."""


class AsyncHttp1Transport(httpx2.AsyncBaseTransport):
    """The async twin of `Http1Transport`. Belongs to the event loop it is used in first."""

    def __init__(self, *, limits: httpx2.Limits) -> None:
        self._slots = asyncio.Semaphore(limits.max_connections or _UNBOUNDED)
        self._idle: IdleConnections[_Link] = IdleConnections(limits)
        self._keeps = True

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """See `Http1Transport.handle_request`."""
        wire, origin, limits = wire_form(request), origin_of(request), limits_of(request)
        await self._wait_for_slot(limits.pool_s)
        try:
            link = self._take(origin) or await _connected(origin, limits.connect_s)
        except BaseException:
            self._slots.release()
            raise
        try:
            answer = await link.ask(wire, limits)
        except BaseException:
            self.done_with(origin, link)
            raise
        return httpx2.Response(
            answer.status,
            headers=answer.headers,
            stream=_Body(self, origin, link, limits.read_s),
            extensions={"http_version": answer.http_version, "reason_phrase": answer.reason},
        )

    def done_with(self, origin: Origin, link: _Link) -> None:
        """Keep a connection whose answer is through, close any other."""
        self._slots.release()
        if link.rest() and self._keeps:
            self._idle.put(origin, link, now_s=time.monotonic())
            self._close_gone()
        else:
            link.close()

    async def aclose(self) -> None:
        """Close the connections that wait, and keep none any more: those in use are closed when they are done with."""
        self._keeps = False
        for link in self._idle.take_all():
            link.close()
        await asyncio.sleep(0)  # the loop closes their sockets in its next round, which may have been its last

    async def _wait_for_slot(self, pool_s: float | None) -> None:
        try:
            with anyio.fail_after(pool_s if self._slots.locked() else None):
                await self._slots.acquire()
        except TimeoutError as error:
            raise httpx2.PoolTimeout("all connections are in use") from error

    def _take(self, origin: Origin) -> _Link | None:
        link = self._idle.take(origin, now_s=time.monotonic())
        self._close_gone()
        return link

    def _close_gone(self) -> None:
        gone, self._idle.gone = self._idle.gone, []
        for link in gone:
            link.close()


async def _connected(origin: Origin, connect_s: float | None) -> _Link:
    loop = asyncio.get_running_loop()
    try:
        with anyio.fail_after(connect_s):  # not `asyncio.timeout`: on Python 3.11 it may leave a cancellation behind
            _, link = await loop.create_connection(_Link, origin.host, origin.port)
    except TimeoutError as error:
        raise httpx2.ConnectTimeout(str(error)) from error
    except OSError as error:
        raise httpx2.ConnectError(str(error)) from error
    return link


class _Link(asyncio.Protocol):
    """One connection. The loop tells it what arrives; one task at a time waits for that."""

    def __init__(self) -> None:
        self.answer = AnswerReader()
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._problem: httpx2.TransportError | None = None
        self._busy = self._ended = self._full = self._holds_back = False

    # ---- for the transport ------------------------------------------------------------------------------------

    async def ask(self, wire: bytes, limits: Limits) -> AnswerReader:
        """Send a request and read the head of its answer."""
        answer = self.answer
        answer.start()
        self._busy = True
        self._transport.write(wire)
        while self._full and not self._ended:
            await self._wait(limits.write_s, httpx2.WriteTimeout)
        while not answer.head_complete:
            await self.receive(limits.read_s)
        return answer

    async def receive(self, read_s: float | None) -> None:
        """Wait until more has come, or raise what came in its place."""
        if self._problem is not None:
            raise self._problem
        if self._holds_back:
            self._holds_back = False
            self._transport.resume_reading()
        await self._wait(read_s, httpx2.ReadTimeout)

    def rest(self) -> bool:
        """Wait for the next request; False: there will be none."""
        self._busy = False
        # An answer that came before the whole request was sent would be followed by the rest of that request.
        return self.answer.reusable and self.is_quiet() and not self._transport.get_write_buffer_size()

    def is_quiet(self) -> bool:
        """Whether it is open and nothing has arrived on it unasked."""
        return not self._ended and not self._holds_back and not self._transport.is_closing()

    def close(self) -> None:
        """At once: an engine must not go on for nobody."""
        self._busy = False
        if not self._loop.is_closed():
            self._transport.abort()

    async def _wait(self, timeout_s: float | None, late: type[httpx2.TimeoutException]) -> None:
        self._waiter = waiter = self._loop.create_future()
        timer = None if timeout_s is None else self._loop.call_later(timeout_s, _expire, waiter, late)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- called by the loop -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Read it."""
        if not self._busy:
            self._ended = True  # nobody asked
            self._transport.abort()
            return
        try:
            self.answer.feed(data)
        except httpx2.RemoteProtocolError as error:
            self._problem = error
        if self.answer.waiting_bytes > WAITING_BYTES_MAX and not self._holds_back and not self._ended:
            self._holds_back = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """The peer says no more; the loop closes the connection."""
        self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        """It is gone."""
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if self._ended:
            return
        self._ended = True
        try:
            if error is None:
                self.answer.end()
            elif not self.answer.complete:
                raise httpx2.ReadError(str(error)) from error
        except httpx2.TransportError as problem:
            self._problem = self._problem or problem
        self._wake()

    def pause_writing(self) -> None:
        """More is being sent than the socket takes."""
        self._full = True

    def resume_writing(self) -> None:
        """It took it."""
        self._full = False
        self._wake()


def _expire(waiter: asyncio.Future[None], late: type[httpx2.TimeoutException]) -> None:
    if not waiter.done():
        waiter.set_exception(late("timed out"))


class _Body(httpx2.AsyncByteStream):
    """The body of an answer."""

    def __init__(self, transport: AsyncHttp1Transport, origin: Origin, link: _Link, read_s: float | None) -> None:
        self._transport, self._origin = transport, origin
        self._link, self._read_s = link, read_s
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        link, answer, read_s = self._link, self._link.answer, self._read_s
        try:
            while True:
                for piece in answer.take():
                    yield piece
                if answer.complete and not answer.waiting_bytes:
                    return
                if not answer.waiting_bytes:
                    await link.receive(read_s)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._transport.done_with(self._origin, self._link)

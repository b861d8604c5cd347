"""The two loops that perform what a flow asks for, and the two streams that hand its answer on.

Blocking and async stand side by side and nowhere else in the package; a test plays every scenario through both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import httpx2

from conserve_sdk._broker_client import AsyncBrokerClient, SyncBrokerClient
from conserve_sdk._turn import (
    Acquire,
    ActiveTurn,
    Discard,
    Effect,
    Fetch,
    Fetched,
    Flow,
    ListEngines,
    Open,
    Opened,
    Park,
    Release,
    Supersede,
    Wait,
)

__all__ = ["AsyncPerformer", "SyncPerformer", "adrive", "arespond", "drive", "respond"]

T = TypeVar("T")

DRAIN_BYTES_MAX = 65_536
"""What may follow a stream's end marker: the framing of its last chunk."""
TICK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncPerformer:
    """How blocking code performs effects."""

    engines: httpx2.BaseTransport
    broker: SyncBrokerClient
    clock_us: Callable[[], int]

    def perform(self, effect: Effect) -> object:  # noqa: PLR0911 -- one per effect
        """Do what the flow asks for and return the answer; errors go back into the flow."""
        match effect:
            case Acquire():
                return self.broker.acquire(
                    effect.request, budget_ms=effect.budget_ms, gone_ms=effect.gone_ms, trace=effect.trace
                )
            case Supersede():
                return self.broker.supersede(
                    effect.lease_id,
                    effect.request,
                    budget_ms=effect.budget_ms,
                    gone_ms=effect.gone_ms,
                    trace=effect.trace,
                )
            case Park():
                return self.broker.park(effect.lease_id, effect.token)
            case Release():
                self.broker.release(effect.lease_id, effect.token)
            case ListEngines():
                return self.broker.engines(budget_ms=effect.budget_ms)
            case Fetch():
                return self._fetch(effect.request)
            case Open():
                return self._open(effect.request)
            case Discard():
                _close(effect.opened.response)
            case Wait():
                return effect.future.result(timeout=effect.timeout_s)
        return None

    def _fetch(self, request: httpx2.Request) -> Fetched:
        response = self.engines.handle_request(request)
        try:
            body = b"".join(_sync_stream(response))
        finally:
            _close(response)
        return Fetched(status=response.status_code, body=body, arrived_us=self.clock_us())

    def _open(self, request: httpx2.Request) -> Opened:
        response = self.engines.handle_request(request)
        rest = iter(_sync_stream(response))
        try:
            first = next(rest, b"")
        except BaseException:
            _close(response)
            raise
        return Opened(response=response, first=first, rest=rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncPerformer:
    """How async code performs effects."""

    engines: httpx2.AsyncBaseTransport
    broker: AsyncBrokerClient
    clock_us: Callable[[], int]

    async def perform(self, effect: Effect) -> object:  # noqa: PLR0911 -- one per effect
        """Do what the flow asks for and return the answer; errors go back into the flow."""
        match effect:
            case Acquire():
                return await self.broker.acquire(
                    effect.request, budget_ms=effect.budget_ms, gone_ms=effect.gone_ms, trace=effect.trace
                )
            case Supersede():
                return await self.broker.supersede(
                    effect.lease_id,
                    effect.request,
                    budget_ms=effect.budget_ms,
                    gone_ms=effect.gone_ms,
                    trace=effect.trace,
                )
            case Park():
                return await self.broker.park(effect.lease_id, effect.token)
            case Release():
                await self.broker.release(effect.lease_id, effect.token)
            case ListEngines():
                return await self.broker.engines(budget_ms=effect.budget_ms)
            case Fetch():
                return await self._fetch(effect.request)
            case Open():
                return await self._open(effect.request)
            case Discard():
                await _aclose_opened(effect.opened)
            case Wait():
                # Not `wait_for`: on Python 3.11 it loses a cancellation that meets the result.
                async with asyncio.timeout(effect.timeout_s):
                    return await asyncio.wrap_future(effect.future)
        return None

    async def _fetch(self, request: httpx2.Request) -> Fetched:
        """Like the blocking one, but wary of an event loop that stands still.

        While it stands (blocking code in a coroutine), an answer waits in the socket and what it grants grows old
        unseen. So its age counts from the last tick of the loop before it was read.
        """
        ticks = _Ticks(self.clock_us)
        try:
            response = await self.engines.handle_async_request(request)
            try:
                body = b"".join([chunk async for chunk in _async_stream(response)])
            finally:
                await _aclose(response)
        finally:
            ticks.stop()
        return Fetched(status=response.status_code, body=body, arrived_us=ticks.last_us)

    async def _open(self, request: httpx2.Request) -> Opened:
        response = await self.engines.handle_async_request(request)
        rest = aiter(_async_stream(response))
        try:
            first = await anext(rest, b"")
        except BaseException:
            await _aclose(response)
            raise
        return Opened(response=response, first=first, rest=rest)


class _Ticks:
    """Notes when the running event loop was last seen alive."""

    def __init__(self, clock_us: Callable[[], int]) -> None:
        self.last_us = clock_us()
        self._clock_us = clock_us
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_later(TICK_S, self._tick)

    def stop(self) -> None:
        self._handle.cancel()

    def _tick(self) -> None:
        self.last_us = self._clock_us()
        self._handle = self._loop.call_later(TICK_S, self._tick)


def drive(flow: Flow[T], perform: Callable[[Effect], object]) -> T:
    """Run a flow to its end, blocking."""
    try:
        effect = next(flow)
        while True:
            try:
                answer = perform(effect)
            except BaseException as error:  # noqa: BLE001 -- the flow decides what it means
                effect = flow.throw(error)
            else:
                effect = flow.send(answer)
    except StopIteration as end:
        return cast("T", end.value)
    finally:
        flow.close()


async def adrive(flow: Flow[T], perform: Callable[[Effect], Awaitable[object]]) -> T:
    """Run a flow to its end, in the running event loop."""
    try:
        effect = next(flow)
        while True:
            try:
                answer = await perform(effect)
            except BaseException as error:  # noqa: BLE001 -- the flow decides what it means
                effect = flow.throw(error)
            else:
                effect = flow.send(answer)
    except StopIteration as end:
        return cast("T", end.value)
    finally:
        flow.close()


def respond(
    opened: Opened, *, turn: ActiveTurn | None = None, headers: dict[str, str] | None = None
) -> httpx2.Response:
    """The application's response, blocking."""
    return _response(opened, stream=_SyncTurnStream(opened, turn), headers=headers)


def arespond(
    opened: Opened, *, turn: ActiveTurn | None = None, headers: dict[str, str] | None = None
) -> httpx2.Response:
    """The application's response, async."""
    return _response(opened, stream=_AsyncTurnStream(opened, turn), headers=headers)


class _SyncTurnStream(httpx2.SyncByteStream):
    """Passes the engine's bytes on, untouched, and tells the turn about them."""

    def __init__(self, opened: Opened, turn: ActiveTurn | None) -> None:
        self._source = _sync_stream(opened.response)  # not the response: it will hold this stream
        self._first, self._rest = opened.first, opened.rest
        self._turn = turn
        self._feed = _ignore if turn is None else turn.feed
        self._exhausted = False
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        rest = self._rest
        assert isinstance(rest, Iterator)
        try:
            if self._first:
                yield self._first
            feed = self._feed
            for chunk in rest:
                feed(chunk)
                yield chunk
            self._exhausted = True
        except GeneratorExit:  # the reader left, perhaps at the end marker
            self.close()
            raise
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    def close(self) -> None:
        """Close the connection, or give it back to the pool where the stream is through.

        openai's client leaves a stream at its end marker, one empty chunk before the connection is free again.
        """
        if self._turn is not None and self._turn.saw_end and not self._exhausted:
            self._drain()
        self._end(None if self._exhausted else GeneratorExit())

    def __del__(self) -> None:
        if not self._closed:  # dropped without `close`: the engine must not go on for nobody
            self._end(GeneratorExit())

    def _drain(self) -> None:
        rest = self._rest
        assert isinstance(rest, Iterator)
        try:
            self._exhausted = _used_up(rest)
        except (httpx2.TransportError, httpx2.StreamError, ValueError):
            self._exhausted = False  # nobody needs these bytes

    def _end(self, error: BaseException | None) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._source.close()
        finally:
            if self._turn is not None:
                self._turn.finish(error)


class _AsyncTurnStream(httpx2.AsyncByteStream):
    """The async twin of `_SyncTurnStream`."""

    def __init__(self, opened: Opened, turn: ActiveTurn | None) -> None:
        self._source = _async_stream(opened.response)
        self._first, self._rest = opened.first, opened.rest
        self._turn = turn
        self._feed = _ignore if turn is None else turn.feed
        self._exhausted = False
        self._closing = False
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        rest = self._rest
        assert isinstance(rest, AsyncIterator)
        try:
            if self._first:
                yield self._first
            feed = self._feed
            async for chunk in rest:
                feed(chunk)
                yield chunk
            self._exhausted = True
        except GeneratorExit:  # the reader left, perhaps at the end marker; its loop tells us so in a task of its own
            await self.aclose()
            raise
        except BaseException as error:
            await self._end(error)
            raise
        await self._end(None)

    async def aclose(self) -> None:
        """See `_SyncTurnStream.close`. Whoever comes second finds it being done."""
        if self._closing:
            return
        self._closing = True
        try:
            if self._turn is not None and self._turn.saw_end and not self._exhausted:
                await self._drain()
        finally:
            await self._end(None if self._exhausted else GeneratorExit())

    def __del__(self) -> None:
        # The connection belongs to its event loop; the account of the turn does not.
        if not self._closed and self._turn is not None:
            self._turn.finish(GeneratorExit())

    async def _drain(self) -> None:
        rest = self._rest
        assert isinstance(rest, AsyncIterator)
        try:
            self._exhausted = await _aused_up(rest)
        except (httpx2.TransportError, httpx2.StreamError, RuntimeError):
            self._exhausted = False  # nobody needs these bytes

    async def _end(self, error: BaseException | None) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await _aclose_source(self._source, self._rest)
        finally:
            if self._turn is not None:
                self._turn.finish(error)


def _ignore(chunk: bytes) -> None:
    """Bytes of an answer that is no turn's."""


def _used_up(rest: Iterator[bytes]) -> bool:
    drained = 0
    for chunk in rest:
        drained += len(chunk)
        if drained > DRAIN_BYTES_MAX:
            return False
    return True


async def _aused_up(rest: AsyncIterator[bytes]) -> bool:
    drained = 0
    async for chunk in rest:
        drained += len(chunk)
        if drained > DRAIN_BYTES_MAX:
            return False
    return True


def _response(opened: Opened, *, stream: Any, headers: dict[str, str] | None) -> httpx2.Response:
    """The engine's own response, with another stream and other headers: making a second one costs 15 us."""
    shown = opened.response
    merged = [(name, value) for name, value in shown.headers.raw if not name.lower().startswith(b"x-conserve-")]
    merged += [(name.encode("ascii"), value.encode("ascii", "replace")) for name, value in (headers or {}).items()]
    shown.headers = httpx2.Headers(merged)
    shown.stream = stream
    return shown


def _sync_stream(response: httpx2.Response) -> httpx2.SyncByteStream:
    assert isinstance(response.stream, httpx2.SyncByteStream)
    return response.stream


def _async_stream(response: httpx2.Response) -> httpx2.AsyncByteStream:
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    return response.stream


def _close(response: httpx2.Response) -> None:
    _sync_stream(response).close()


async def _aclose(response: httpx2.Response) -> None:
    await _async_stream(response).aclose()


async def _aclose_opened(opened: Opened) -> None:
    await _aclose_source(_async_stream(opened.response), opened.rest)


async def _aclose_source(source: httpx2.AsyncByteStream, rest: object) -> None:
    """Close the engine's stream and the generator that reads it, so that none is left to the loop's finaliser."""
    await source.aclose()
    if isinstance(rest, AsyncGenerator):
        with suppress(RuntimeError):  # another task is reading: it will find the stream closed
            await rest.aclose()

"""Calls to the broker, in both colours over the same builders and parsers.

The only place where tenacity is used: every call here may be repeated (acquire and supersede are idempotent, reports
and renewals are hints), which is not true of a turn.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import httpx2
import tenacity

from conserve_sdk import _broker_calls as calls
from conserve_sdk._broker_access import BrokerAccess
from conserve_sdk._broker_attempts import Attempts, BrokerUrls
from conserve_sdk._broker_calls import Answer, BrokerCall, TryAgain
from conserve_sdk._broker_starts import Starts
from conserve_sdk._fork import call_in_forked_child
from conserve_sdk._http import AsyncHTTPTransport
from conserve_sdk._http1 import AsyncHttp1Transport, Http1Transport
from conserve_sdk._jitter import own_random
from conserve_sdk._loops import PerLoop
from conserve_sdk.errors import LeaseExpired, LeaseLost
from conserve_sdk.protocol import (
    BatchAnswer,
    EngineList,
    LeaseGrant,
    LeaseRequest,
    LeaseStatus,
    RenewalBatch,
    ReportBatch,
    SupersedeRequest,
)

__all__ = ["AsyncBrokerClient", "SyncBrokerClient"]

LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
"""Not httpx2's hundred: so many first turns may well wait for admission, and renewals must not wait behind them."""

_T = TypeVar("_T")
_Make = Callable[[int], BrokerCall]
_Parse = Callable[[BrokerCall, Answer], _T]


class _InLoop(NamedTuple):
    """What one event loop calls brokers with."""

    network: httpx2.AsyncBaseTransport
    starts: Starts


class SyncBrokerClient:
    """Blocking calls. Thread-safe; connections are dropped in a forked child. Environment proxies are not used.

    Args:
        broker_urls: tried in order; the one that answered last is asked first.
        access: API key, authorities and certificate.
        transport: replaces the network (tests); never closed from here.
        sleep, clock, jitter: replace time (tests); seconds.

    Every call raises `BrokerUnavailable` when no broker answered within the budget, `ProtocolError` for an answer
    that makes no sense, and `LeaseExpired` / `LeaseLost` where the broker says so.
    """

    _network: httpx2.BaseTransport | None
    _lock: threading.Lock

    def __init__(
        self,
        broker_urls: Sequence[str],
        *,
        access: BrokerAccess | None = None,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = own_random,
    ) -> None:
        self._brokers = BrokerUrls(broker_urls)
        self._access = access or BrokerAccess()
        self._transport = transport
        self._sleep, self._clock, self._jitter = sleep, clock, jitter
        self._start_afresh()
        call_in_forked_child(self._start_afresh)

    @property
    def broker_urls(self) -> tuple[str, ...]:
        """The brokers, in the order given."""
        return self._brokers.urls

    def acquire(
        self,
        request: LeaseRequest,
        *,
        budget_ms: int,
        gone_ms: int | None = None,
        trace: Mapping[str, str] | None = None,
    ) -> LeaseGrant:
        """Ask for a lease; `request.wait_ms` of the budget may pass in the broker's queue.

        `gone_ms` is how long brokers are tried again that take no connection; None: like silent ones. `trace`
        holds headers (`traceparent`, `tracestate`) that let the broker join the caller's trace.

        Raises:
            LeaseRefused: not admitted within `wait_ms`.
        """
        return self._perform(
            lambda wait_ms: calls.acquire_call(request, wait_ms=wait_ms, trace=trace),
            calls.parse_grant,
            budget_ms=budget_ms,
            patience_ms=request.wait_ms,
            gone_ms=gone_ms,
        )

    def supersede(
        self,
        lease_id: str,
        request: SupersedeRequest,
        *,
        budget_ms: int,
        gone_ms: int | None = None,
        trace: Mapping[str, str] | None = None,
    ) -> LeaseGrant:
        """Replace a lease whose engine failed.

        Raises:
            LeaseRefused: not admitted within `wait_ms`.
        """
        return self._perform(
            lambda wait_ms: calls.supersede_call(lease_id, request, wait_ms=wait_ms, trace=trace),
            calls.parse_grant,
            budget_ms=budget_ms,
            patience_ms=request.wait_ms,
            gone_ms=gone_ms,
        )

    def park(self, lease_id: str, token: str, *, budget_ms: int = 2_000) -> LeaseStatus:
        """Tell that the conversation waits for a human; the answer holds the shorter life."""
        return self._perform(lambda _: calls.park_call(lease_id, token), calls.parse_status, budget_ms=budget_ms)

    def release(self, lease_id: str, token: str, *, budget_ms: int = 2_000) -> None:
        """Give a lease back. One that is gone already is no error."""
        self._perform(lambda _: calls.release_call(lease_id, token), _check_released, budget_ms=budget_ms)

    def report(self, batch: ReportBatch, *, budget_ms: int = 2_000) -> BatchAnswer:
        """Send a batch of reports; results in the same order."""
        parse = _batch_parser(len(batch.reports))
        return self._perform(lambda _: calls.report_call(batch), parse, budget_ms=budget_ms)

    def renew(self, batch: RenewalBatch, *, budget_ms: int = 2_000) -> BatchAnswer:
        """Renew leases by their tokens; results in the same order."""
        parse = _batch_parser(len(batch.tokens))
        return self._perform(lambda _: calls.renew_call(batch), parse, budget_ms=budget_ms)

    def engines(self, *, budget_ms: int = 2_000) -> EngineList:
        """The engines as the broker sees them."""
        return self._perform(lambda _: calls.engines_call(), calls.parse_engines, budget_ms=budget_ms)

    def close(self) -> None:
        """Close the connections. Idempotent; a later call opens new ones."""
        with self._lock:
            network, self._network = self._network, None
        if network is not None:
            network.close()

    def _start_afresh(self) -> None:
        # In a forked child the sockets are the parent's: forget them without a goodbye on the wire.
        self._lock = threading.Lock()
        self._network = None

    def _connections(self) -> httpx2.BaseTransport:
        if self._transport is not None:
            return self._transport
        with self._lock:
            if self._network is None:
                verify = self._access.verify(self._brokers.urls)
                plain = verify is False
                self._network = (
                    Http1Transport(limits=LIMITS) if plain else httpx2.HTTPTransport(verify=verify, limits=LIMITS)
                )
            return self._network

    def _perform(
        self, make: _Make, parse: _Parse[_T], *, budget_ms: int, patience_ms: int = 0, gone_ms: int | None = None
    ) -> _T:
        attempts = Attempts(
            self._brokers,
            budget_ms=budget_ms,
            patience_ms=patience_ms,
            gone_ms=gone_ms,
            clock=self._clock,
            jitter=self._jitter,
        )

        def attempt() -> _T:
            network, call = self._connections(), make(attempts.wait_left_ms())
            try:
                answer = _receive(network, attempts.request(call, self._access.headers()), attempts)
            except httpx2.TransportError as exc:
                raise attempts.unanswered(exc) from exc
            return attempts.answered(parse(call, answer))

        try:
            return attempt()
        except TryAgain as exc:
            first = exc
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TryAgain),
            stop=attempts.is_over,
            wait=attempts.pause_s,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return retrying(_after(first, attempt))
        except TryAgain as last:
            raise last.error from last.__cause__


class AsyncBrokerClient:
    """The same calls as coroutines; usable from several event loops, each with connections of its own.

    See `SyncBrokerClient`.
    """

    def __init__(
        self,
        broker_urls: Sequence[str],
        *,
        access: BrokerAccess | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = own_random,
    ) -> None:
        self._brokers = BrokerUrls(broker_urls)
        self._access = access or BrokerAccess()
        self._transport = transport
        self._sleep, self._clock, self._jitter = sleep, clock, jitter
        self._loops = PerLoop(self._made, close=self._closed)

    async def acquire(
        self,
        request: LeaseRequest,
        *,
        budget_ms: int,
        gone_ms: int | None = None,
        trace: Mapping[str, str] | None = None,
    ) -> LeaseGrant:
        """See `SyncBrokerClient.acquire`."""
        return await self._perform(
            lambda wait_ms: calls.acquire_call(request, wait_ms=wait_ms, trace=trace),
            calls.parse_grant,
            budget_ms=budget_ms,
            patience_ms=request.wait_ms,
            gone_ms=gone_ms,
        )

    async def supersede(
        self,
        lease_id: str,
        request: SupersedeRequest,
        *,
        budget_ms: int,
        gone_ms: int | None = None,
        trace: Mapping[str, str] | None = None,
    ) -> LeaseGrant:
        """See `SyncBrokerClient.supersede`."""
        return await self._perform(
            lambda wait_ms: calls.supersede_call(lease_id, request, wait_ms=wait_ms, trace=trace),
            calls.parse_grant,
            budget_ms=budget_ms,
            patience_ms=request.wait_ms,
            gone_ms=gone_ms,
        )

    async def park(self, lease_id: str, token: str, *, budget_ms: int = 2_000) -> LeaseStatus:
        """See `SyncBrokerClient.park`."""
        return await self._perform(lambda _: calls.park_call(lease_id, token), calls.parse_status, budget_ms=budget_ms)

    async def release(self, lease_id: str, token: str, *, budget_ms: int = 2_000) -> None:
        """See `SyncBrokerClient.release`."""
        await self._perform(lambda _: calls.release_call(lease_id, token), _check_released, budget_ms=budget_ms)

    async def report(self, batch: ReportBatch, *, budget_ms: int = 2_000) -> BatchAnswer:
        """See `SyncBrokerClient.report`."""
        parse = _batch_parser(len(batch.reports))
        return await self._perform(lambda _: calls.report_call(batch), parse, budget_ms=budget_ms)

    async def renew(self, batch: RenewalBatch, *, budget_ms: int = 2_000) -> BatchAnswer:
        """See `SyncBrokerClient.renew`."""
        parse = _batch_parser(len(batch.tokens))
        return await self._perform(lambda _: calls.renew_call(batch), parse, budget_ms=budget_ms)

    async def engines(self, *, budget_ms: int = 2_000) -> EngineList:
        """See `SyncBrokerClient.engines`."""
        return await self._perform(lambda _: calls.engines_call(), calls.parse_engines, budget_ms=budget_ms)

    async def aclose(self) -> None:
        """Close this loop's connections. Idempotent; a later call opens new ones."""
        await self._loops.aclose()

    def _made(self) -> _InLoop:
        if self._transport is not None:
            return _InLoop(self._transport, Starts())
        verify = self._access.verify(self._brokers.urls)
        plain = verify is False
        network = AsyncHttp1Transport(limits=LIMITS) if plain else AsyncHTTPTransport(verify=verify, limits=LIMITS)
        return _InLoop(network, Starts())

    async def _closed(self, here: _InLoop) -> None:
        if self._transport is None:
            await here.network.aclose()

    async def _perform(
        self, make: _Make, parse: _Parse[_T], *, budget_ms: int, patience_ms: int = 0, gone_ms: int | None = None
    ) -> _T:
        attempts = Attempts(
            self._brokers,
            budget_ms=budget_ms,
            patience_ms=patience_ms,
            gone_ms=gone_ms,
            clock=self._clock,
            jitter=self._jitter,
        )

        async def attempt() -> _T:
            here = await self._loops.get()
            try:
                async with here.starts.one(within_s=attempts.time_left_s(), may_wait=patience_ms > 0):
                    call = make(attempts.wait_left_ms())
                    answer = await _areceive(here.network, attempts.request(call, self._access.headers()), attempts)
            except httpx2.TransportError as exc:
                raise attempts.unanswered(exc) from exc
            return attempts.answered(parse(call, answer))

        try:
            return await attempt()
        except TryAgain as exc:
            first = exc
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TryAgain),
            stop=attempts.is_over,
            wait=attempts.pause_s,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return await retrying(_aafter(first, attempt))
        except TryAgain as last:
            raise last.error from last.__cause__


def _receive(network: httpx2.BaseTransport, request: httpx2.Request, attempts: Attempts) -> Answer:
    """Send a request and read its answer, however long or slow, within bounds.

    No client round the transport: nobody is redirected, keeps cookies or has a proxy here, and looking for all that
    cost as much as the rest of a call.
    """
    head, body = network.handle_request(request), bytearray()
    head.request = request
    try:
        for chunk in head.iter_bytes():
            body += chunk
            attempts.received(head, body)
    finally:
        head.close()
    return Answer(head, bytes(body))


async def _areceive(network: httpx2.AsyncBaseTransport, request: httpx2.Request, attempts: Attempts) -> Answer:
    """The async twin of `_receive`."""
    head, body = await network.handle_async_request(request), bytearray()
    head.request = request
    try:
        async for chunk in head.aiter_bytes():
            body += chunk
            attempts.received(head, body)
    finally:
        await head.aclose()
    return Answer(head, bytes(body))


def _after(first: TryAgain, attempt: Callable[[], _T]) -> Callable[[], _T]:
    """The attempts, the first of which was made already: most calls need no second one, and no tenacity."""
    made = [first]

    def again() -> _T:
        if made:
            raise made.pop()
        return attempt()

    return again


def _aafter(first: TryAgain, attempt: Callable[[], Awaitable[_T]]) -> Callable[[], Awaitable[_T]]:
    """The async twin of `_after`."""
    made = [first]

    async def again() -> _T:
        if made:
            raise made.pop()
        return await attempt()

    return again


def _batch_parser(expected: int) -> _Parse[BatchAnswer]:
    def parse(call: BrokerCall, answer: Answer) -> BatchAnswer:
        return calls.parse_batch(call, answer, expected=expected)

    return parse


def _check_released(call: BrokerCall, answer: Answer) -> None:
    try:
        calls.check(call, answer)
    except (LeaseExpired, LeaseLost):
        return  # not ours any more, which is what was asked for

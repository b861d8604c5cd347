"""A whole broker in memory: the real core and the real desk behind an httpx2 transport."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import httpx2

from conserve_sdk._desk import Call, Desk, Outcome, ProblemRaised, Reply, find_route, lease_token_in, query_as_body
from conserve_sdk.core import Broker
from conserve_sdk.core.decisions import LeaseStored
from conserve_sdk.core.events import EngineSpec, Event, Recovered, RequestCancelled, TimerFired
from conserve_sdk.core.lease import Lease
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import EngineId, LeaseId, ModelName, Ms, RequestId, Tokens, TransferGroup
from conserve_sdk.core.vocabulary import Role
from conserve_sdk.protocol import Problem
from conserve_sdk.testing._clock import FakeClock
from conserve_sdk.testing._engines import ImaginedFleet
from conserve_sdk.tokens import SigningKey, TokenSigner

WaitingRule = Literal["skip_ahead", "block"]

_KEY = SigningKey(kid="in-memory", secret=b"a key for tests, known to everyone")
_GRACE_MS = Ms(30_000)


def small_fleet(*, model: str = "test-model", prefillers: int = 1, decoders: int = 2) -> tuple[EngineSpec, ...]:
    """Engines ``p0..`` and ``d0..`` of one model and one transfer group, at URLs nobody resolves."""
    names = [(f"p{n}", Role.PREFILLER) for n in range(prefillers)] + [(f"d{n}", Role.DECODER) for n in range(decoders)]
    return tuple(
        EngineSpec(
            engine_id=EngineId(name),
            url=f"http://{name}.invalid",
            role=role,
            model=ModelName(model),
            transfer_group=TransferGroup("test"),
            kv_capacity_tokens=Tokens(100_000),
            block_size_tokens=Tokens(16),
            max_model_len_tokens=Tokens(32_768),
            max_hold_ms=Ms(30_000),
        )
        for name, role in names
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerExchange:
    """One request that the broker answered."""

    method: str
    path: str
    status: int
    request: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parked:
    request_id: RequestId
    future: Future[Reply]


class InMemoryBroker(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """Serves the broker's `/v1` routes in the caller's process; hand it over as `broker_transport`.

    Nothing sleeps and no thread is started. Engines are imagined: each answers a scrape every second of the fake
    clock, until `fail_engine` or `restart_engine` says otherwise. Thread-safe.

    A request that has to wait for admission follows `waiting`. With ``"skip_ahead"`` the fake clock runs on until
    the request is settled: leases that expire on the way make room, else it is refused at its deadline; so a test
    with a single thread never hangs. With ``"block"`` the caller really waits until another thread or task makes room
    or advances the clock.

    Args:
        engines: the fleet; `small_fleet()` when None.
        settings: of the core; defaults when None. With `BrokerSettings(placement=PAPER)` every first turn migrates; the
            default preset prefers an idle decoder.
        clock: the only source of time.
        waiting: see above.

    Attributes:
        core: the real state machine, to be read from.
        exchanges: every request answered so far.
        url: an address for clients that want one; only this transport knows it.
    """

    url = "http://broker.invalid"

    def __init__(
        self,
        engines: Sequence[EngineSpec] | None = None,
        *,
        settings: BrokerSettings | None = None,
        clock: FakeClock | None = None,
        waiting: WaitingRule = "skip_ahead",
    ) -> None:
        self.clock = clock or FakeClock()
        self.exchanges: list[BrokerExchange] = []
        self._settings = settings or BrokerSettings()
        self._waiting_rule = waiting
        self._lock = threading.RLock()
        self._ids = 0
        self._rows: dict[LeaseId, Lease] = {}
        self._futures: dict[RequestId, Future[Reply]] = {}
        self._failures: deque[int] = deque()
        self._running = True
        self._fleet = ImaginedFleet(small_fleet() if engines is None else engines, now_ms=self.clock.now_ms())
        self._boot(None)
        self.clock.on_advance(self._tick)

    # ---- the transport ------------------------------------------------------------------------------------------

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Serve a blocking client."""
        request.read()
        answer = self._serve(request)
        if isinstance(answer, Reply):
            return self._response(request, answer)
        self._skip_ahead(answer.future)
        return self._response(request, answer.future.result())

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Serve a client on an event loop; cancelling it cancels the waiting request."""
        await request.aread()
        answer = self._serve(request)
        if isinstance(answer, Reply):
            return self._response(request, answer)
        self._skip_ahead(answer.future)
        try:
            return self._response(request, await asyncio.wrap_future(answer.future))
        except asyncio.CancelledError:
            self._cancel(answer.request_id)
            raise

    def close(self) -> None:
        """Nothing to close: the broker outlives the clients it is handed to."""

    async def aclose(self) -> None:
        """See `close`."""

    def _serve(self, request: httpx2.Request) -> Reply | _Parked:
        with self._lock:
            if not self._running:
                raise httpx2.ConnectError("the in-memory broker is stopped", request=request)
            self._tick()
            if self._failures:
                status = self._failures.popleft()
                return Reply(status=status, body=Problem(title="Told to fail", status=status, detail="", code="told"))
            try:
                route, target = find_route(request.method, request.url.path)
            except ProblemRaised as problem:
                return problem.reply
            call = Call(
                now_ms=self.clock.now_ms(),
                target=target,
                lease_token=lease_token_in(request.headers),
                raw=query_as_body(request.url.params.multi_items()) if route.query else request.content,
            )
            outcome = self._desk.handle(route, call)
            self._carry_out(outcome)
            if outcome.reply is not None:
                return outcome.reply
            assert outcome.waiting is not None, "a request is answered or waits"
            parked = _Parked(request_id=outcome.waiting, future=Future())
            parked.future.set_running_or_notify_cancel()  # a cancelled task must not cancel what another thread settles
            self._futures[parked.request_id] = parked.future
            return parked

    def _response(self, request: httpx2.Request, reply: Reply) -> httpx2.Response:
        self.exchanges.append(
            BrokerExchange(method=request.method, path=request.url.path, status=reply.status, request=request.content)
        )
        return httpx2.Response(reply.status, headers=reply.headers, content=reply.content(), request=request)

    # ---- what a test does to it ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """The process dies: connections are refused, waiting requests end, time passes without it."""
        with self._lock:
            self._running = False
            futures, self._futures = self._futures, {}
            for future in futures.values():
                future.set_exception(httpx2.RemoteProtocolError("the in-memory broker stopped"))

    def start(self, *, lose_state: bool = False) -> None:
        """The process starts and recovers from its journal; with `lose_state` the journal is empty."""
        with self._lock:
            if lose_state:
                self._rows.clear()
            self._boot(tuple(self._rows.values()))
            self._running = True

    def restart(self, *, lose_state: bool = False) -> None:
        """`stop`, then `start`."""
        self.stop()
        self.start(lose_state=lose_state)

    def fail_next(self, count: int = 1, *, status: int = 500) -> None:
        """Answer the next `count` requests with `status` without looking at them."""
        with self._lock:
            self._failures.extend([status] * count)

    def fail_engine(self, engine_id: str) -> None:
        """The engine stops answering scrapes; the broker notices after its own delays."""
        self._change(engine_id, up=False)

    def restart_engine(self, engine_id: str) -> None:
        """The engine comes (back) up as another incarnation with an empty cache, and is scraped at once."""
        self._change(engine_id, up=True, restarted=True, kv_used_tokens=0, running=0)

    def load_engine(self, engine_id: str, *, kv_used_tokens: int | None = None, running: int | None = None) -> None:
        """The engine shows this load, from a scrape at once on."""
        self._change(engine_id, kv_used_tokens=kv_used_tokens, running=running)

    def journal(self) -> tuple[Lease, ...]:
        """The leases that a restart would recover."""
        with self._lock:
            return tuple(self._rows.values())

    def _change(
        self,
        engine_id: str,
        *,
        up: bool | None = None,
        restarted: bool = False,
        kv_used_tokens: int | None = None,
        running: int | None = None,
    ) -> None:
        with self._lock:
            self._tick()
            engine = self._fleet.change(
                engine_id, up=up, restarted=restarted, kv_used_tokens=kv_used_tokens, running=running
            )
            if self._running:
                self._feed(engine.scraped(self.clock.now_ms()))

    # ---- waiting ------------------------------------------------------------------------------------------------

    def _skip_ahead(self, future: Future[Reply]) -> None:
        while self._waiting_rule == "skip_ahead" and not future.done():
            deadline_ms = self.core.next_deadline_ms()
            assert deadline_ms is not None, "a waiting request has a deadline"
            self.clock.advance(max(0, deadline_ms - self.clock.now_ms()))

    def _cancel(self, request_id: RequestId) -> None:
        with self._lock:
            self._futures.pop(request_id, None)
            self._feed(RequestCancelled(now_ms=self.clock.now_ms(), request_id=request_id))

    # ---- the shell: ids, clock, journal -------------------------------------------------------------------------

    def _boot(self, leases: tuple[Lease, ...] | None) -> None:
        self.core = Broker(self._settings)
        signer = TokenSigner([_KEY])
        self._desk = Desk(self.core, settings=self._settings, signer=signer, new_id=self._new_id)
        now_ms = self.clock.now_ms()
        if leases is not None:
            self._feed(Recovered(now_ms=now_ms, leases=leases, grace_ms=_GRACE_MS))
        self._feed(*self._fleet.configured(now_ms))
        self._feed(*self._fleet.scraped(now_ms))

    def _new_id(self, kind: str) -> str:
        self._ids += 1
        return f"{kind}-{self._ids}"

    def _tick(self) -> None:
        """Catch up with the clock: scrapes and timers, each at its own instant."""
        with self._lock:
            now_ms = self.clock.now_ms()
            while self._running and (due_ms := self._next_due_ms()) <= now_ms:
                if due_ms == self._fleet.next_scrape_ms:
                    self._feed(*self._fleet.scraped(due_ms))
                else:
                    self._feed(TimerFired(now_ms=due_ms))

    def _next_due_ms(self) -> Ms:
        deadline_ms = self.core.next_deadline_ms()
        return self._fleet.next_scrape_ms if deadline_ms is None else min(deadline_ms, self._fleet.next_scrape_ms)

    def _feed(self, *events: Event) -> None:
        if events:
            self._carry_out(self._desk.feed(*events))

    def _carry_out(self, outcome: Outcome) -> None:
        for change in outcome.changes:
            if isinstance(change, LeaseStored):
                self._rows[change.lease.lease_id] = change.lease
            else:
                self._rows.pop(change.lease.lease_id, None)
        for request_id, reply in outcome.settled:
            future = self._futures.pop(request_id, None)
            if future is not None:
                future.set_result(reply)

"""One life of a broker: everything that is made at its start and gone after its end."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import uvicorn

from conserve_broker._access_tables import ApiKeyTable
from conserve_broker._connections import Connections
from conserve_broker._dial import AddressGuard
from conserve_broker._engine_http import Door
from conserve_broker._http_protocol import bounded_protocol
from conserve_broker._url_guard import UrlGuard
from conserve_broker.app import create_app
from conserve_broker.clock import BrokerClock, ResponsiveLoop
from conserve_broker.dns_discovery import DnsWatcher
from conserve_broker.feed import Feed
from conserve_broker.front import Front
from conserve_broker.gate import Gate
from conserve_broker.history import Everyone, History
from conserve_broker.hold_releases import HoldReleases
from conserve_broker.journal import Journal, JournalPort
from conserve_broker.logbook import Log
from conserve_broker.membership import Membership
from conserve_broker.metrics import BrokerMetrics
from conserve_broker.redis_store import RedisStore
from conserve_broker.registration import registration_routes
from conserve_broker.reload import ConfigWatcher, FleetEvent
from conserve_broker.replica import Replica
from conserve_broker.scrape import Scraper
from conserve_broker.service import BrokerService, Observer
from conserve_broker.settings import BrokerConfig
from conserve_broker.snapshot import history_of, snapshot_of
from conserve_broker.tls import ServerTls
from conserve_broker.tracing import Tracing
from conserve_sdk.core import Broker
from conserve_sdk.core.events import EngineObserved, EngineSpec, EngineUnreachable
from conserve_sdk.core.units import EngineId
from conserve_sdk.tokens import TokenSigner

T = TypeVar("T")

_GRACEFUL_S = 5
_KEEP_ALIVE_S = 75
_END_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ASK_S = 60.0
_GC_THRESHOLDS = (1_500, 1, 1_000_000)
"""Requests leave no cycles behind, so looking for them after every 700 objects was a seventh of all CPU. What is new is
looked at twice, in small heaps: a pass over every lease of the last minute held up all grants for 200 ms. The third
generation is never looked at; `BrokerService` freezes it."""


class Life:
    """Runs once, in the thread that calls `run`.

    Attributes:
        front: what requests are answered by; its service comes and goes with the leadership among replicas.
        gate: who may ask.

    Args:
        config: the whole configuration.
        listener: a bound socket; closed at the end.
        journal: closed at the end; None: replicas share a store, and each leadership brings its journal.
        signer: of lease tokens.
        config_path: file to watch, or None.
        overrides: the command line's share of the configuration, for reloads.
        log: where decisions are logged.
        freeze_gc: see `BrokerService`.
        tracing: makes spans, or None.
    """

    def __init__(
        self,
        config: BrokerConfig,
        *,
        listener: socket.socket,
        journal: JournalPort | None,
        signer: TokenSigner,
        config_path: Path | None,
        overrides: Mapping[str, Any] | None,
        log: Log,
        freeze_gc: bool,
        tracing: Tracing | None = None,
    ) -> None:
        self._config = config
        self._listener = listener
        self._journal = journal
        self._signer = signer
        self._config_path = config_path
        self._overrides = overrides
        self._log = log
        self._freeze_gc = freeze_gc
        self._clock = BrokerClock()
        self._metrics = BrokerMetrics()
        self._connections = Connections(
            connections_max=config.listen.connections_max, per_address_max=config.listen.connections_per_address_max
        )
        self._history = History()
        self._tracing = tracing
        self._watcher: ConfigWatcher | None = None
        self._dns: DnsWatcher | None = None
        self._membership: Membership | None = None
        self._releases: HoldReleases | None = None
        self._replica = None if journal is not None else self._new_replica()
        self._elections: asyncio.Queue[Journal | str] = asyncio.Queue()
        self._sightings: dict[EngineId, EngineObserved] = {}
        self._tls = ServerTls(config.tls) if config.tls.enabled else None
        self._engine_keys = config.engine_keys()
        self._dns_names: dict[EngineId, str] = {}
        self._address_guard = AddressGuard(UrlGuard(config.registration.allow).networks)
        self.gate = Gate(
            config.api_keys(),
            access=config.access,
            admitted=self._metrics.admitted,
            denied=self._metrics.denied,
            log=log,
        )
        self.front = Front(leadership=self._replica, warnings=self._warnings)
        self._feed = Feed(
            lambda: snapshot_of(self.front, now_ms=self._clock.now_ms()),
            lambda: history_of(self._history),
            listeners_max=config.watch.event_listeners_max,
        )
        self._metrics.watch_broker(
            role=lambda: self.front.readiness().role,
            listeners=lambda: self._feed.listeners,
            connections=self._connections,
        )
        self._uvicorn = self._http()
        self._server: _Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fault: BaseException | None = None
        self._killed = False

    def _http(self) -> uvicorn.Config:
        """The application and the server that it runs on."""
        config = self._config
        return uvicorn.Config(
            create_app(
                self.front,
                metrics=self._metrics,
                gate=self.gate,
                engine_key=self._engine_key,
                more_routes=registration_routes(config.registration, self._members),
                feed=self._feed,
                tracing=self._tracing,
            ),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # who a client is, its key says
            server_header=False,
            http=bounded_protocol(
                request_timeout_s=config.listen.request_timeout_ms / 1000,
                connections=self._connections,
            ),
            ssl_context_factory=None if self._tls is None else self._tls_context,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACEFUL_S,
        )

    # ---- in the life's own thread -------------------------------------------------------------------------------

    def run(self, on_started: Callable[[], None]) -> None:
        """Live until `stop`, `kill` or a signal; raises what ended the life, if anything did."""
        if self._freeze_gc:
            gc.set_threshold(*_GC_THRESHOLDS)
            gc.collect()  # what the imports left behind; later, only what is new needs a look
        with asyncio.Runner(loop_factory=self._uvicorn.get_loop_factory()) as runner:
            runner.run(self._main(on_started))
        if self._fault is not None:
            raise self._fault

    def run_in_thread(self, started: Future[None]) -> None:
        """`run`, with the start or its failure told through `started`."""
        try:
            self.run(lambda: started.set_result(None))
        except BaseException as fault:
            if started.done():
                raise
            started.set_exception(fault)

    async def _main(self, on_started: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        if not self.gate.closed:
            at_home = self._config.listen.host in ("127.0.0.1", "::1", "localhost")  # as a demo is: no news
            tell = self._log.info if at_home else self._log.warning
            tell("broker_open", detail="no API key is configured: whoever reaches this broker may use it")
        async with AsyncExitStack() as stack:
            stack.callback(self._listener.close)
            stack.push_async_callback(self._end)
            scraper = await stack.enter_async_context(
                Scraper(self._config.scrape, emit=self._sighted, now_ms=self._clock.now_ms, door_of=self._door_of)
            )
            self._releases = await stack.enter_async_context(
                HoldReleases(
                    self._signer,
                    now_ms=self._clock.now_ms,
                    new_transport=scraper.new_transport,
                    door_of=self._door_of,
                    counted=self._metrics.hold_released,
                    log=self._log,
                )
            )
            scraper.configure(self._config.engine_configs())
            self._membership = Membership(
                self._config.engine_configs(),
                watch=scraper.configure,
                now_ms=self._clock.now_ms,
                grace_ms=self._config.lease.grace_ms,
            )
            background = [asyncio.create_task(scraper.run(), name="scraper")]
            if self._config_path is not None:
                self._watcher = self._new_watcher(self._config_path)
                background.append(asyncio.create_task(self._watcher.run(), name="config watcher"))
            if self._journal is not None:
                await self._begin(self._journal)
            background.append(asyncio.create_task(self._membership.run(), name="membership"))
            if self._config.discovery.dns:
                self._dns = DnsWatcher(self._config.discovery, found=self._found_by_dns)
                background.append(asyncio.create_task(self._dns.run(), name="discovery"))
            if self._replica is not None:
                background.append(asyncio.create_task(self._follow_elections(), name="elections"))
                self._replica.start()
            if self._tls is not None:
                background.append(asyncio.create_task(self._tls.run(), name="tls"))
            stack.push_async_callback(_cancelled, background)
            for task in background:
                task.add_done_callback(self._background_ended)
            self._server = _Server(self._uvicorn, before_shutdown=self._hand_over, on_started=on_started)
            await self._server.serve(sockets=[self._listener])

    # ---- deciding, for as long as this broker leads -----------------------------------------------------------

    async def _begin(self, journal: JournalPort) -> None:
        service = BrokerService(
            self._config.core_settings(),
            engines=(),
            signer=self._signer,
            journal=journal,
            grace_ms=self._config.lease.grace_ms,
            clock=self._clock,
            observer=Everyone([each for each in self._observers() if each is not None]),
            log=self._log,
            freeze_gc=self._freeze_gc,
        )
        members = self._members()
        await service.start(more_engines=members.restore)
        members.begin(service)
        now_ms = self._clock.now_ms()
        for seen in self._sightings.values():  # a standby has watched the engines, too
            if now_ms - seen.now_ms <= self._config.scrape.suspect_after_ms:
                service.feed(replace(seen, now_ms=self._clock.now_ms()))
        self._metrics.watch(service.core, clock=self._clock)
        self._history.watch(service.core)
        self.front.service = service

    def _observers(self) -> Sequence[Observer | None]:
        return self._metrics, self._history, self._releases, self._tracing

    async def _follow_elections(self) -> None:
        while True:
            match await self._elections.get():
                case str(reason):
                    self._log.warning("broker_deposed", reason=reason)
                    await self._step_down()
                case journal:
                    await self._begin(journal)
                    self._log.info("broker_leads")

    async def _step_down(self) -> None:
        service, self.front.service = self.front.service, None
        self._members().end()
        self._metrics.forget()
        self._history.forget()
        if self._releases is not None:
            self._releases.forget()
        if service is not None:
            service.quiesce()
            await asyncio.to_thread(service.abandon)

    async def _hand_over(self) -> None:
        """The end is near: answer who waits, write what is queued, and let the next leader begin at once."""
        self._feed.close()
        service = self.front.service
        if service is not None:
            service.quiesce()
        if self._replica is not None:
            if service is not None:
                await service.stop()
            await asyncio.to_thread(self._replica.stop)

    async def _end(self) -> None:
        if self._replica is not None:
            await asyncio.to_thread(self._replica.stop, release=not self._killed)
        service = self.front.service
        if service is not None and not self._killed:
            await service.stop()
        elif service is None and self._journal is not None:
            self._journal.close()

    def _new_replica(self) -> Replica:
        def tell(news: Journal | str) -> None:
            assert self._loop is not None, "the life has started"
            self._loop.call_soon_threadsafe(self._elections.put_nowait, news)

        def ask(callback: Callable[[], None]) -> None:
            assert self._loop is not None, "the life has started"
            self._loop.call_soon_threadsafe(callback)

        port = self._listener.getsockname()[1]
        settings = self._config.core_settings()
        return Replica(
            lambda: RedisStore(self._config.store),
            new_core=lambda: Broker(settings),
            freeze_gc=self._freeze_gc,
            url=self._config.advertised_url(port=port),
            elected=lambda journal, _: tell(journal),
            deposed=tell,
            loop=ResponsiveLoop(ask),
        )

    # ---- what is seen -------------------------------------------------------------------------------------------

    def _sighted(self, event: EngineObserved | EngineUnreachable) -> None:
        if isinstance(event, EngineObserved):
            self._sightings[event.engine_id] = event
        else:
            self._sightings.pop(event.engine_id, None)
        if self.front.service is not None:
            self.front.service.feed(event)

    def _new_watcher(self, path: Path) -> ConfigWatcher:
        def apply(config: BrokerConfig, _: Sequence[FleetEvent]) -> None:
            self._config, self._engine_keys = config, config.engine_keys()
            self._members().set_file(config.engine_configs())

        def apply_keys(config: BrokerConfig, keys: Sequence[ApiKeyTable]) -> None:
            self.gate.replace(keys, access=config.access)

        return ConfigWatcher(
            path,
            self._config,
            apply=apply,
            apply_keys=apply_keys,
            now_ms=self._clock.now_ms,
            overrides=self._overrides,
        )

    def _found_by_dns(self, name: str, specs: Sequence[EngineSpec]) -> None:
        self._dns_names |= {spec.engine_id: name for spec in specs}
        self._members().set_dns(name, specs)

    def _door_of(self, engine_id: EngineId) -> Door:
        if self._members().announced_itself(engine_id):
            return Door(self._engine_key(engine_id), self._address_guard)
        return Door(self._engine_key(engine_id))

    def _engine_key(self, engine_id: EngineId) -> str:
        keys = self._engine_keys
        if engine_id in keys.of_file:
            return keys.of_file[engine_id]
        if engine_id in self._dns_names:
            return keys.of_dns.get(self._dns_names[engine_id], "")
        return keys.of_registered if self._members().announced_itself(engine_id) else ""

    def _members(self) -> Membership:
        assert self._membership is not None, "made at the start of the life"
        return self._membership

    def _warnings(self) -> tuple[str, ...]:
        own = [each.problem for each in (self._watcher, self._tls) if each is not None]
        return (*filter(None, own), *(() if self._dns is None else self._dns.problems))

    def _tls_context(self, *_: object) -> ssl.SSLContext:
        assert self._tls is not None, "asked for where there is one"
        return self._tls.context

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        """A broker that no longer sees its engines must not go on as if it did."""
        if not task.cancelled() and (fault := task.exception()) is not None and self._server is not None:
            self._log.critical("broker_failed", task=task.get_name(), detail=repr(fault))
            self._fault = fault
            self._server.should_exit = True

    # ---- from other threads -------------------------------------------------------------------------------------

    def ask(self, question: Callable[[Life], T]) -> T:
        """Call `question` in the life's own thread and return what it says."""
        assert self._loop is not None, "the life has started"
        answer: Future[T] = Future()

        def put() -> None:
            try:
                answer.set_result(question(self))
            except BaseException as fault:  # noqa: BLE001  # raised again in the thread that asked
                answer.set_exception(fault)

        self._loop.call_soon_threadsafe(put)
        return answer.result(_ASK_S)

    def stop(self) -> None:
        """End in good order."""
        assert self._server is not None, "the life has started"
        self._server.should_exit = True

    def kill(self) -> None:
        """End as a crash would: no answer leaves any more, nothing that is queued gets written."""
        assert self._server is not None, "the life has started"
        self._killed = True
        self._server.break_connections()
        if self.front.service is not None:
            self.front.service.abandon()


class _Server(uvicorn.Server):
    """Uvicorn, told when it serves, and not kept from stopping by requests that wait for admission."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        before_shutdown: Callable[[], Awaitable[None]],
        on_started: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._before_shutdown = before_shutdown
        self._ending: asyncio.Future[None] | None = None
        self._on_started = on_started

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn would raise its signals again after serving, and end the process before the journal is closed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in _END_SIGNALS:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in _END_SIGNALS:
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        self.should_exit = True
        self._begin_to_end()  # uvicorn looks only ten times a second, and a standby waits for us

    def _begin_to_end(self) -> asyncio.Future[None]:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._before_shutdown())
        return self._ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self.force_exit:
            await self._begin_to_end()
        await super().shutdown(sockets=sockets)

    def break_connections(self) -> None:
        self.should_exit = self.force_exit = True
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

"""One life of a broker: everything that is made at its start and gone after its end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvicorn

from conserve_broker.app import create_app
from conserve_broker.journal import JournalPort
from conserve_broker.logbook import Log
from conserve_broker.metrics import BrokerMetrics
from conserve_broker.reload import ConfigWatcher, FleetEvent
from conserve_broker.scrape import Scraper
from conserve_broker.service import BrokerService
from conserve_broker.settings import BrokerConfig
from conserve_sdk.tokens import TokenSigner

T = TypeVar("T")

_GRACEFUL_S = 5
_KEEP_ALIVE_S = 75
_END_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ASK_S = 60.0


class Life:
    """Runs once, in the thread that calls `run`.

    Args:
        config: the whole configuration.
        listener: a bound socket; closed at the end.
        journal: closed at the end.
        signer: of lease tokens.
        config_path: file to watch, or None.
        overrides: the command line's share of the configuration, for reloads.
        log: where decisions are logged.
        freeze_gc: see `BrokerService`.
    """

    def __init__(
        self,
        config: BrokerConfig,
        *,
        listener: socket.socket,
        journal: JournalPort,
        signer: TokenSigner,
        config_path: Path | None,
        overrides: Mapping[str, Any] | None,
        log: Log,
        freeze_gc: bool,
    ) -> None:
        self._config = config
        self._listener = listener
        self._config_path = config_path
        self._overrides = overrides
        self._metrics = BrokerMetrics()
        self.service = BrokerService(
            config.core_settings(),
            engines=config.engine_configs(),
            signer=signer,
            journal=journal,
            grace_ms=config.lease.grace_ms,
            observer=self._metrics,
            log=log,
            freeze_gc=freeze_gc,
        )
        self._metrics.watch(self.service.core, clock=self.service.clock)
        self._uvicorn = uvicorn.Config(
            create_app(self.service, metrics=self._metrics),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACEFUL_S,
        )
        self._server: _Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fault: BaseException | None = None
        self._killed = False

    # ---- in the life's own thread -------------------------------------------------------------------------------

    def run(self, on_started: Callable[[], None]) -> None:
        """Live until `stop`, `kill` or a signal; raises what ended the life, if anything did."""
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
        async with AsyncExitStack() as stack:
            stack.callback(self._listener.close)
            stack.push_async_callback(self._end_service)
            await self.service.start()
            scraper = await stack.enter_async_context(
                Scraper(self._config.scrape, emit=self.service.feed, now_ms=self.service.clock.now_ms)
            )
            scraper.configure(self._config.engine_configs())
            background = [asyncio.create_task(scraper.run(), name="scraper")]
            if self._config_path is not None:
                watcher = self._watcher(self._config_path, scraper)
                background.append(asyncio.create_task(watcher.run(), name="config watcher"))
            stack.push_async_callback(_cancelled, background)
            for task in background:
                task.add_done_callback(self._background_ended)
            self._server = _Server(self._uvicorn, service=self.service, on_started=on_started)
            await self._server.serve(sockets=[self._listener])

    async def _end_service(self) -> None:
        if not self._killed:
            await self.service.stop()

    def _watcher(self, path: Path, scraper: Scraper) -> ConfigWatcher:
        def apply(config: BrokerConfig, events: Sequence[FleetEvent]) -> None:
            self.service.feed(*events)
            scraper.configure(config.engine_configs())

        watcher = ConfigWatcher(
            path, self._config, apply=apply, now_ms=self.service.clock.now_ms, overrides=self._overrides
        )
        self.service.reload_problem = lambda: watcher.problem
        return watcher

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        """A broker that no longer sees its engines must not go on as if it did."""
        if not task.cancelled() and (fault := task.exception()) is not None and self._server is not None:
            self.service.log.critical("broker_failed", task=task.get_name(), detail=repr(fault))
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
        self.service.abandon()


class _Server(uvicorn.Server):
    """Uvicorn, told when it serves, and not kept from stopping by requests that wait for admission."""

    def __init__(self, config: uvicorn.Config, *, service: BrokerService, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self.force_exit:
            self._service.quiesce()
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

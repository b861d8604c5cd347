"""A broker that runs: service, scraper and HTTP server together, in a thread of this process or in the foreground."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from conserve_broker._life import Life
from conserve_broker.journal import JournalPort, open_journal
from conserve_broker.logbook import Log, logger
from conserve_broker.settings import BrokerConfig, ConfigProblem
from conserve_broker.tracing import Tracing
from conserve_sdk.core.vocabulary import EngineState
from conserve_sdk.tokens import TokenSigner

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

__all__ = ["BrokerServer"]

_BACKLOG = 2048
_POLL_S = 0.02


class BrokerServer:
    """Runs a broker in a thread of its own, with its own event loop; a context manager.

    It can be stopped or killed and started again: it comes back at the same port, with the same token keys and
    from the same journal.

    Args:
        config: the whole configuration; port 0 lets the system choose one.
        config_path: the file it came from, watched for changes of the engines; None: nothing is watched.
        overrides: the command line's share of `config`, which wins over the file again when that changes.
        journal: used instead of opening `config.journal.path` (tests, and restarts without a file).
        log: where decisions are logged; the standard logger ``conserve.broker`` when None.
        tracer_provider: where spans go with ``watch.tracing = "otel"``; OpenTelemetry's global one when None.

    Raises:
        ConfigProblem: the address cannot be bound, a token key is missing, or OpenTelemetry is.
        JournalError: the journal cannot be used.
    """

    def __init__(
        self,
        config: BrokerConfig,
        *,
        config_path: Path | None = None,
        overrides: Mapping[str, Any] | None = None,
        journal: JournalPort | None = None,
        log: Log | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        self._config = config
        self._config_path = config_path
        self._overrides = overrides
        self._given_journal = journal
        self._log = log or logger()
        self._host = config.listen.host
        self._port = config.listen.port
        self._signer = TokenSigner(config.token_keys())
        self._tracing = Tracing(tracer_provider) if config.watch.tracing == "otel" else None
        self._life: Life | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where clients reach it; known after the first start."""
        if not self._port:
            raise RuntimeError("the broker has no port yet: start it first")
        return self._config.url_of(self._host, self._port)

    def start(self) -> Self:
        """Start and return once requests are served.

        Raises:
            ConfigProblem: the address cannot be bound.
            JournalError: the journal cannot be used.
        """
        if self._thread is not None:
            raise RuntimeError("the broker runs already")
        life = self._new_life()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=life.run_in_thread, args=(started,), name="conserve-broker", daemon=True)
        self._thread.start()
        try:
            started.result()
        except BaseException:
            self._thread.join()
            self._thread = None
            raise
        self._life = life
        return self

    def serve_forever(self) -> None:
        """Serve in the calling thread until SIGINT or SIGTERM; then shut down in good order.

        Raises:
            ConfigProblem: the address cannot be bound.
            JournalError: the journal cannot be used.
        """
        self._new_life(freeze_gc=True).run(
            lambda: self._log.info("broker_started", url=self.url, engines=len(self._config.engine))
        )

    def wait_until_ready(self, *, timeout_s: float = 30.0, engines: int = 1) -> None:
        """Return once engines are ready, so that new conversations can be served.

        Args:
            timeout_s: how long to wait at most.
            engines: how many engines must be ready.

        Raises:
            TimeoutError: not ready in time; the message says why not.
        """
        give_up = time.monotonic() + timeout_s
        while (ready := self._running().ask(_ready_engines)) < engines:
            if time.monotonic() > give_up:
                reasons = "; ".join(self._running().ask(lambda life: life.front.readiness().reasons))
                detail = f"{ready} of {engines} engines are ready" + (f" ({reasons})" if reasons else "")
                raise TimeoutError(f"the broker is not ready after {timeout_s:g} s: {detail}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Shut down in good order: waiting requests are answered, the journal is closed. Safe to call twice."""
        self._end(Life.stop)

    def kill(self) -> None:
        """End as `kill -9` would: connections break, nothing that is queued gets written."""
        self._end(Life.kill)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _new_life(self, *, freeze_gc: bool = False) -> Life:
        listener = _bound(self._host, self._port)
        try:
            life = Life(
                self._config,
                listener=listener,
                journal=self._journal(),
                signer=self._signer,
                config_path=self._config_path,
                overrides=self._overrides,
                log=self._log,
                freeze_gc=freeze_gc,
                tracing=self._tracing,
            )
        except BaseException:
            listener.close()
            raise
        self._port = listener.getsockname()[1]
        return life

    def _journal(self) -> JournalPort | None:
        """Of a broker that is alone; None for one of several, which gets a journal whenever it leads."""
        if self._given_journal is not None:
            return self._given_journal
        return None if self._config.store.kind == "redis" else open_journal(self._config.journal.path)

    def _running(self) -> Life:
        if self._life is None:
            raise RuntimeError("the broker does not run: start it first")
        return self._life

    def _end(self, how: Callable[[Life], None]) -> None:
        life, thread = self._life, self._thread
        if life is None or thread is None:
            return
        if thread.is_alive():
            life.ask(how)
        thread.join()
        self._life = self._thread = None


def _ready_engines(life: Life) -> int:
    service = life.front.service
    return 0 if service is None else sum(view.state is EngineState.READY for view in service.core.engines())


def _bound(host: str, port: int) -> socket.socket:
    """A listening address of our own; `create_server` lets a restarted broker have its port back at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        remedy = "is another broker running? stop it or choose another listen.port"
        raise ConfigProblem([f"listen: cannot bind {host}:{port} ({error.strerror}); {remedy}"]) from error

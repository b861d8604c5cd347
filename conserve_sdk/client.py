"""The front door: one `ConServe` object per program, and the clients that share it."""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import Hashable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import httpx2
import openai

from conserve_sdk._drive import adrive, drive
from conserve_sdk._lean import AsyncOpenAI, OpenAI
from conserve_sdk._turn import park_flow, release_all_flow, release_flow
from conserve_sdk.errors import ConfigError
from conserve_sdk.identity import wire_id
from conserve_sdk.telemetry import ConversationStats
from conserve_sdk.transport import AsyncConServeTransport, ConServeOptions, ConServeTransport, Settings
from conserve_sdk.transport._runtime import Runtime

__all__ = ["BASE_URL", "ConServe", "async_openai_client", "connect", "openai_client"]

BASE_URL = "http://conserve.invalid/v1"
"""What clients name as their server: a reserved name (RFC 2606), since each turn's engine comes from its lease."""

NO_KEY = "EMPTY"
"""vLLM's word for "no API key". Set, so that a key for another service in the environment goes nowhere."""

TELL_S = 2.0
"""Reports of turns that are over go before a park or a release, if the broker takes them in this time."""

_live: weakref.WeakSet[Runtime] = weakref.WeakSet()
_shared: dict[Hashable, ConServe] = {}
_shared_lock = threading.Lock()


class ConServe:
    """Leases, lineages, reports and connections, shared by every client made from it. Thread-safe.

    ```python
    with ConServe("http://127.0.0.1:7070") as conserve:
        client = conserve.openai_client()
        with conversation("ticket-17"):
            client.chat.completions.create(model="...", messages=[...])
    ```

    Args:
        broker_url: one broker or several, tried in order; default: the environment's `CONSERVE_BROKER_URL`.
        options: see `ConServeOptions`.

    Raises:
        ConfigError: an option is wrong.
    """

    def __init__(self, broker_url: str | Sequence[str] | None = None, **options: Unpack[ConServeOptions]) -> None:
        self._start(Settings.resolve(broker_url, options))

    def _start(self, settings: Settings) -> None:
        self._runtime = Runtime(settings)
        _live.add(self._runtime)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._runtime.closed

    @property
    def reports_dropped(self) -> int:
        """Reports given up because no broker took them for too long."""
        return self._runtime.reporter.dropped

    # ---- clients ----------------------------------------------------------------------------------------------

    def transport(self) -> ConServeTransport:
        """A transport for a blocking httpx2 client."""
        return ConServeTransport.sharing(self._runtime)

    def async_transport(self) -> AsyncConServeTransport:
        """A transport for an async httpx2 client."""
        return AsyncConServeTransport.sharing(self._runtime)

    def http_client(self) -> httpx2.Client:
        """A blocking HTTP client for libraries that take one. Closing it closes nothing that others share."""
        return _SharedClient(transport=self.transport(), base_url=BASE_URL, timeout=self._timeout())

    def async_http_client(self) -> httpx2.AsyncClient:
        """An async HTTP client for libraries that take one. Closing it closes nothing that others share."""
        return _SharedAsyncClient(transport=self.async_transport(), base_url=BASE_URL, timeout=self._timeout())

    def openai_client(self, **options: Any) -> openai.OpenAI:
        """An openai client whose completions travel by lease.

        Args:
            options: for `openai.OpenAI`; `api_key` is the engines' own, if they want one.
        """
        return OpenAI(**self._openai_options(options), http_client=self.http_client())

    def async_openai_client(self, **options: Any) -> openai.AsyncOpenAI:
        """The async twin of `openai_client`."""
        return AsyncOpenAI(**self._openai_options(options), http_client=self.async_http_client())

    # ---- conversations ----------------------------------------------------------------------------------------

    def release(self, conversation_id: str) -> int:
        """Give back the leases of a conversation that is over; returns how many.

        A lease that is not given back expires by itself, and a conversation goes on whenever it wants to: its next
        turn is a first turn then. A broker that cannot be reached is no error.
        """
        self._tell()
        flow = release_flow(self._runtime.kit, conversation=wire_id(conversation_id))
        return drive(flow, self._runtime.performer.perform)

    async def arelease(self, conversation_id: str) -> int:
        """The async twin of `release`."""
        await asyncio.to_thread(self._tell)
        flow = release_flow(self._runtime.kit, conversation=wire_id(conversation_id))
        return await adrive(flow, self._runtime.async_performer.perform)

    def idle(self, conversation_id: str) -> int:
        """Stop renewing the leases of a conversation whose agent run has returned; returns how many were renewed.

        A run that ended in a tool call looks as if it still waited for the tool, and its leases would be kept for it.
        Nothing is sent, so there is no async twin: the leases live on to their end, and a next turn uses them.
        """
        return self._runtime.idle(wire_id(conversation_id))

    def park(self, conversation_id: str) -> int:
        """Tell that a conversation waits for a human, so that no engine keeps its KV for long; returns how many."""
        self._tell()
        flow = park_flow(self._runtime.kit, conversation=wire_id(conversation_id))
        try:
            return drive(flow, self._runtime.performer.perform)
        finally:
            if self.closed:  # adapters park beside the program, which may have closed this meanwhile
                self._runtime.broker.close()

    async def apark(self, conversation_id: str) -> int:
        """The async twin of `park`."""
        await asyncio.to_thread(self._tell)
        flow = park_flow(self._runtime.kit, conversation=wire_id(conversation_id))
        return await adrive(flow, self._runtime.async_performer.perform)

    def stats(self, conversation_id: str) -> ConversationStats:
        """What a conversation's turns cost so far; `print` shows it as a table. All zero for an unknown one.

        Counts turns sent through this object, for the conversations that were busy last (512 of them).

        Args:
            conversation_id: the application's id, such as LangGraph's `thread_id`.
        """
        return self._runtime.kit.stats.stats(wire_id(conversation_id))

    # ---- lifetime ---------------------------------------------------------------------------------------------

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Send all reports now; False when the broker did not take them in time."""
        return self._runtime.reporter.flush(timeout_s)

    def close(self, *, release: bool = False) -> None:
        """Report what is left, close the connections, stop the background thread. Idempotent.

        Args:
            release: also give back every lease. Not the default, because a lease belongs to its conversation, which
                another process may go on with; one that nobody uses expires.
        """
        if release and not self._runtime.closed:
            self._tell()
            drive(release_all_flow(self._runtime.kit), self._runtime.performer.perform)
        self._runtime.close()

    async def aclose(self, *, release: bool = False) -> None:
        """The async twin of `close`; closes the running event loop's connections too."""
        if release and not self._runtime.closed:
            await asyncio.to_thread(self._tell)
            await adrive(release_all_flow(self._runtime.kit), self._runtime.async_performer.perform)
        await self._runtime.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # connections and leases are shared by design

    def __getstate__(self) -> Settings:
        return self._runtime.settings

    def __setstate__(self, settings: Settings) -> None:
        self._start(settings)  # unpickled elsewhere: the same options, leases and connections of its own

    # ---- pieces -----------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Report the turns so far: a report that came after a park would wake the lease, after a release be lost."""
        self._runtime.reporter.flush(TELL_S)

    def _timeout(self) -> httpx2.Timeout:
        timeouts = self._runtime.settings.timeouts
        return httpx2.Timeout(timeouts.read_s, connect=timeouts.connect_s)

    @staticmethod
    def _openai_options(options: dict[str, Any]) -> dict[str, Any]:
        if "http_client" in options:
            raise ConfigError(
                "http_client is ConServe's own here: use ConServe.transport() in yours", key="http_client"
            )
        return {"base_url": BASE_URL, "api_key": NO_KEY, **options}


class _SharedClient(httpx2.Client):
    """Stays open: openai closes its client's HTTP client, also that of a `with_options()` copy, for all copies."""

    def close(self) -> None:
        """Close nothing; `ConServe.close` does."""


class _SharedAsyncClient(httpx2.AsyncClient):
    """The async twin of `_SharedClient`."""

    async def aclose(self) -> None:
        """Close nothing; `ConServe.aclose` does."""


def connect(broker_url: str | Sequence[str] | None = None, **options: Unpack[ConServeOptions]) -> ConServe:
    """The `ConServe` object of this process for a broker and options; made at the first call, then shared.

    Adapters use it, so that many model objects cost one set of connections and one background thread.

    Args:
        broker_url: one broker or several; default: the environment's `CONSERVE_BROKER_URL`.
        options: see `ConServeOptions`.

    Raises:
        ConfigError: an option is wrong.
    """
    settings = Settings.resolve(broker_url, options)
    key = _key(settings, options)
    with _shared_lock:
        shared = _shared.get(key)
        if shared is None or shared.closed:
            shared = _shared[key] = ConServe(broker_url, **options)
        return shared


def openai_client(
    broker_url: str | Sequence[str] | None = None, *, broker_api_key: str | None = None, **options: Any
) -> openai.OpenAI:
    """An openai client over the shared `ConServe` object of this process.

    Args:
        broker_url: one broker or several; default: the environment's `CONSERVE_BROKER_URL`.
        broker_api_key: this program's key at the broker; default: the environment's `CONSERVE_BROKER_API_KEY`.
        options: for `openai.OpenAI`; `api_key` is the engines' own.
    """
    return connect(broker_url, broker_api_key=broker_api_key).openai_client(**options)


def async_openai_client(
    broker_url: str | Sequence[str] | None = None, *, broker_api_key: str | None = None, **options: Any
) -> openai.AsyncOpenAI:
    """The async twin of `openai_client`."""
    return connect(broker_url, broker_api_key=broker_api_key).async_openai_client(**options)


def _key(settings: Settings, options: ConServeOptions) -> Hashable:
    """Options that compare by value do; hooks and transports are the same only if they are the same object."""
    shown = [
        (name, value if isinstance(value, str | int | float | None) else id(value))
        for name, value in sorted(options.items())
        if name not in ("fallback_engines", "timeouts") and not name.startswith("broker_api")
    ]
    return (settings.broker_urls, settings.access, settings.fallback_engines, settings.timeouts, *shown)


@atexit.register
def _close_all() -> None:
    """Reports of the last turns would be lost otherwise."""
    for runtime in tuple(_live):
        runtime.close()

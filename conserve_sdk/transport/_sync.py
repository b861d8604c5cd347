"""The blocking transport."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Self, Unpack

import httpx2

from conserve_sdk._drive import drive, respond
from conserve_sdk._turn import TurnFlow
from conserve_sdk.transport._runtime import Runtime
from conserve_sdk.transport._settings import ConServeOptions, Settings

__all__ = ["ConServeTransport"]


class ConServeTransport(httpx2.BaseTransport):
    """Sends completions by lease: first turns through a prefiller, all others straight to their decoder.

    Thread-safe. A transport made here owns its leases and connections and closes them; one that comes from
    `ConServe.transport()` shares those of its `ConServe` object, and closing it closes nothing.

    Args:
        broker_url: one broker or several, tried in order; default: the environment's `CONSERVE_BROKER_URL`.
        options: see `ConServeOptions`.

    Raises:
        ConfigError: an option is wrong.
    """

    def __init__(self, broker_url: str | Sequence[str] | None = None, **options: Unpack[ConServeOptions]) -> None:
        self._runtime = Runtime(Settings.resolve(broker_url, options))
        self._owned = True

    @classmethod
    def sharing(cls, runtime: Runtime) -> Self:
        """A transport over the leases and connections of a `ConServe` object."""
        transport = cls.__new__(cls)
        transport._runtime, transport._owned = runtime, False  # noqa: SLF001 -- this class's own
        return transport

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer one request of an httpx2 client.

        Raises:
            ConServeError: no lease, no broker, no engine; openai's client passes these on without a retry.
            httpx2.TransportError: an engine failed; openai's client retries these.
        """
        self._warn_in_event_loop()
        flow = self._runtime.flow(request, request.read())
        perform = self._runtime.performer.perform
        if isinstance(flow, httpx2.Response):
            return flow
        if isinstance(flow, TurnFlow):
            answer = drive(flow.run(), perform)
            return respond(answer.opened, turn=answer.turn, headers=answer.headers)
        return respond(drive(flow, perform))

    def close(self) -> None:
        """Report what is left and close the connections, if they are this transport's own."""
        if self._owned:
            self._runtime.close()

    def _warn_in_event_loop(self) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        self._runtime.kit.warn_once(
            "sync_in_loop", "a blocking client is called inside an event loop and stalls it: use the async client"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # connections and leases are shared by design

    def __getstate__(self) -> Settings:
        return self._runtime.settings

    def __setstate__(self, settings: Settings) -> None:
        # Unpickled elsewhere: the same options, leases and connections of its own.
        self._runtime, self._owned = Runtime(settings), True

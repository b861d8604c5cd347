"""The async transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, Unpack

import httpx2

from conserve_sdk._drive import adrive, arespond
from conserve_sdk._turn import TurnFlow
from conserve_sdk.transport._runtime import Runtime
from conserve_sdk.transport._settings import ConServeOptions, Settings

__all__ = ["AsyncConServeTransport"]


class AsyncConServeTransport(httpx2.AsyncBaseTransport):
    """The async twin of `ConServeTransport`; usable from several event loops."""

    def __init__(self, broker_url: str | Sequence[str] | None = None, **options: Unpack[ConServeOptions]) -> None:
        self._runtime = Runtime(Settings.resolve(broker_url, options))
        self._owned = True

    @classmethod
    def sharing(cls, runtime: Runtime) -> Self:
        """A transport over the leases and connections of a `ConServe` object."""
        transport = cls.__new__(cls)
        transport._runtime, transport._owned = runtime, False  # noqa: SLF001 -- this class's own
        return transport

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer one request of an httpx2 client; see `ConServeTransport.handle_request`."""
        flow = self._runtime.flow(request, await request.aread())
        perform = self._runtime.async_performer.perform
        if isinstance(flow, httpx2.Response):
            return flow
        if isinstance(flow, TurnFlow):
            answer = await adrive(flow.run(), perform)
            return arespond(answer.opened, turn=answer.turn, headers=answer.headers)
        return arespond(await adrive(flow, perform))

    async def aclose(self) -> None:
        """Report what is left and close the connections, if they are this transport's own."""
        if self._owned:
            await self._runtime.aclose()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # connections and leases are shared by design

    def __getstate__(self) -> Settings:
        return self._runtime.settings

    def __setstate__(self, settings: Settings) -> None:
        # Unpickled elsewhere: the same options, leases and connections of its own.
        self._runtime, self._owned = Runtime(settings), True

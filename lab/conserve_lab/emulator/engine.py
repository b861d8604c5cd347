"""One emulated engine: its HTTP server, its port, and one incarnation after another."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from starlette.types import Scope

from conserve_lab.emulator.app import build_app
from conserve_lab.emulator.config import EmulatorConfig
from conserve_lab.emulator.errors import ApiError
from conserve_lab.emulator.fabric import Fabric
from conserve_lab.emulator.faults import FaultOrder
from conserve_lab.emulator.incarnation import Incarnation
from conserve_lab.emulator.records import RequestRecord
from conserve_lab.emulator.server import EngineServer

_RECORDS_MAX = 20_000


class Engine:
    """An engine on the fleet's event loop.

    Args:
        config: The engine.
        kv_port: Its side channel port.
        fabric: The wires to its peers.
        clock_us: A monotonic clock in microseconds.

    Raises:
        OSError: The port cannot be bound.
    """

    def __init__(self, config: EmulatorConfig, *, kv_port: int, fabric: Fabric, clock_us: Callable[[], int]) -> None:
        self.config = config
        self._kv_port = kv_port
        self._fabric = fabric
        self._clock_us = clock_us
        self._incarnation: Incarnation | None = None
        self._records: deque[RequestRecord] = deque(maxlen=_RECORDS_MAX)
        self._server = EngineServer(build_app(self), host=config.host, port=config.port)

    @property
    def url(self) -> str:
        """Base URL without `/v1`."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self._server.port}"

    @property
    def alive(self) -> bool:
        """Whether it listens."""
        return self._incarnation is not None

    @property
    def live(self) -> Incarnation:
        """The running incarnation.

        Raises:
            ApiError: There is none.
        """
        if self._incarnation is None:
            raise ApiError(f"engine {self.config.id} is dead; restart it", status=503)
        return self._incarnation

    def record(self, entry: RequestRecord) -> None:
        """Remember a request."""
        self._records.append(entry)

    def records(self) -> list[RequestRecord]:
        """Return the requests remembered, of all incarnations, oldest first."""
        return list(self._records)

    def clear_records(self) -> None:
        """Forget the requests so far."""
        self._records.clear()

    def drop(self, scope: Scope) -> None:
        """Cut the connection of a request."""
        self._server.drop(scope)

    async def order(self, order: FaultOrder) -> None:
        """Carry out a fault order."""
        live = self.live
        live.faults.apply(order)
        if order.expire_kv:
            live.expire_now()
        if order.kill:
            await self.kill()

    async def start(self) -> None:
        """Begin a new life with an empty cache; nothing happens when it is alive."""
        if self._incarnation is not None:
            return
        incarnation = Incarnation(
            self.config,
            kv_port=self._kv_port,
            fabric=self._fabric,
            clock_us=self._clock_us,
            started_at_s=time.time(),
        )
        self._incarnation = incarnation
        incarnation.start()
        await self._server.start()

    async def kill(self) -> None:
        """Die at once: connections are cut and refused, cache and holds are gone."""
        incarnation, self._incarnation = self._incarnation, None
        if incarnation is not None:
            incarnation.stop()
        await self._server.kill()

    async def close(self) -> None:
        """Die and give the port back."""
        await self.kill()
        self._server.close()

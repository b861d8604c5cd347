"""A fleet of emulated engines in one process, on its own event loop thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Self, TypeVar

import uvicorn

from conserve_lab.emulator.config import EmulatorConfig, FleetConfig, default_fleet
from conserve_lab.emulator.engine import Engine
from conserve_lab.emulator.fabric import Fabric
from conserve_lab.emulator.faults import FaultOrder
from conserve_lab.emulator.records import RequestRecord

T = TypeVar("T")

_KV_PORT_BASE = 5600
_CALL_TIMEOUT_S = 30.0


class EmulatedEngine:
    """A handle on one engine of a running fleet, usable from any thread.

    Args:
        fleet: The fleet.
        engine: The engine on the fleet's loop.
    """

    def __init__(self, fleet: EmulatedFleet, engine: Engine) -> None:
        self._fleet = fleet
        self.engine_on_loop = engine

    @property
    def config(self) -> EmulatorConfig:
        """Its configuration."""
        return self.engine_on_loop.config

    @property
    def id(self) -> str:
        """Its id in the fleet."""
        return self.config.id

    @property
    def role(self) -> str:
        """`prefiller`, `decoder` or `both`."""
        return self.config.role

    @property
    def model(self) -> str:
        """The model name it serves."""
        return self.config.model

    @property
    def url(self) -> str:
        """Base URL without `/v1`, the same over restarts."""
        return self.engine_on_loop.url

    @property
    def alive(self) -> bool:
        """Whether it accepts connections."""
        return self.engine_on_loop.alive

    @property
    def requests(self) -> list[RequestRecord]:
        """Generation requests that have ended, of all incarnations, oldest first."""
        return self._fleet.call(self._later(self.engine_on_loop.records))

    @property
    def nixl_engine_id(self) -> str:
        """The connector's engine id; changes with every restart."""
        return self._fleet.call(self._later(lambda: self.engine_on_loop.live.nixl_engine_id))

    @property
    def kv_used_blocks(self) -> int:
        """Blocks referenced by running requests and holds."""
        return self._fleet.call(self._later(lambda: self.engine_on_loop.live.model.pool.used))

    @property
    def held_requests(self) -> int:
        """Finished requests whose blocks are held for a lease."""
        return self._fleet.call(self._later(lambda: len(self.engine_on_loop.live.model.holds)))

    def clear_requests(self) -> None:
        """Forget the requests recorded so far."""
        self._fleet.call(self._later(self.engine_on_loop.clear_records))

    def kill(self) -> None:
        """Cut and refuse connections, as if the process had died."""
        self._fleet.call(self.engine_on_loop.kill())

    def restart(self) -> None:
        """Kill it if needed and start a new incarnation on the same port, with an empty cache and no faults."""

        async def again() -> None:
            await self.engine_on_loop.kill()
            await self.engine_on_loop.start()

        self._fleet.call(again())

    def faults(self, **order: Any) -> None:
        """Order faults: the keys of `FaultOrder`, e.g. `faults(fail_next=2, fail_status=503)`.

        Raises:
            pydantic.ValidationError: A key is unknown or out of range.
        """
        self._fleet.call(self.engine_on_loop.order(FaultOrder(**order)))

    async def _later(self, read: Callable[[], T]) -> T:
        return read()


class EmulatedFleet:
    """N engines in this process, each on its own loopback port. A context manager, sync and async alike.

    The engines live on one event loop in one daemon thread, so the caller's loop, or the lack of one, does not
    matter; every method may be called from any thread.

    Args:
        config: The fleet; two prefillers and three decoders by default.
        settings: Changes made to every engine, e.g. `time_scale=0` or `kv_lease_ms=2000`.

    Raises:
        FleetConfigError: A setting is wrong.
    """

    def __init__(self, config: FleetConfig | None = None, **settings: Any) -> None:
        config = config or default_fleet()
        self.config = config.with_all(**settings) if settings else config
        self._engines: list[EmulatedEngine] = []
        self._fabric = Fabric()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def engines(self) -> Sequence[EmulatedEngine]:
        """The engines, in the order of the configuration."""
        return tuple(self._engines)

    @property
    def prefillers(self) -> Sequence[EmulatedEngine]:
        """Engines of role `prefiller`."""
        return tuple(engine for engine in self._engines if engine.role == "prefiller")

    @property
    def decoders(self) -> Sequence[EmulatedEngine]:
        """Engines of role `decoder`."""
        return tuple(engine for engine in self._engines if engine.role == "decoder")

    def engine(self, engine_id: str) -> EmulatedEngine:
        """Return one engine.

        Raises:
            KeyError: The fleet has no such engine.
        """
        for engine in self._engines:
            if engine.id == engine_id:
                return engine
        known = ", ".join(engine.id for engine in self._engines) or "none (not started)"
        raise KeyError(f"no engine {engine_id!r}; engines are {known}")

    def kill(self, engine_id: str) -> None:
        """See `EmulatedEngine.kill`."""
        self.engine(engine_id).kill()

    def restart(self, engine_id: str) -> None:
        """See `EmulatedEngine.restart`."""
        self.engine(engine_id).restart()

    def faults(self, engine_id: str, **order: Any) -> None:
        """See `EmulatedEngine.faults`."""
        self.engine(engine_id).faults(**order)

    def broker_engines(self, *, transfer_group: str = "emulated") -> list[dict[str, Any]]:
        """Return the engines as the dictionaries of a broker configuration."""
        return [
            {
                "id": engine.id,
                "url": engine.url,
                "role": engine.role,
                "model": engine.model,
                "connector": engine.config.connector,
                "block_size_tokens": engine.config.block_size,
                "transfer_group": "" if engine.config.connector == "none" else transfer_group,
            }
            for engine in self._engines
        ]

    # ---- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every engine.

        Raises:
            RuntimeError: It runs already.
            OSError: A configured port cannot be bound.
        """
        if self._loop is not None:
            raise RuntimeError("the fleet runs already; stop it first")
        factory = uvicorn.Config(_no_app, log_config=None, log_level=None).get_loop_factory() or asyncio.new_event_loop
        self._loop = factory()
        self._thread = threading.Thread(target=self._loop.run_forever, name="emulated-fleet", daemon=True)
        self._thread.start()
        try:
            self.call(self._start())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill every engine and end the thread; safe to call twice."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        self.call(self._stop())
        self._loop = self._thread = None
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the fleet's loop and return its result.

        Raises:
            RuntimeError: The fleet is not running.
        """
        if self._loop is None:
            work.close()
            raise RuntimeError("the fleet is not running; use it as a context manager or call start()")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_TIMEOUT_S)

    async def _start(self) -> None:
        for index, config in enumerate(self.config.engine):
            engine = Engine(
                config, kv_port=config.kv_port or _KV_PORT_BASE + index, fabric=self._fabric, clock_us=_now_us
            )
            self._engines.append(EmulatedEngine(self, engine))
            await engine.start()

    async def _stop(self) -> None:
        await asyncio.gather(*(handle.engine_on_loop.close() for handle in self._engines))
        self._engines.clear()
        current = asyncio.current_task()
        left = [task for task in asyncio.all_tasks() if task is not current]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_asyncgens()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await asyncio.to_thread(self.stop)


async def _no_app(_scope: Any, _receive: Any, _send: Any) -> None:
    """Stand in for an app where uvicorn's configuration only picks the event loop."""


def _now_us() -> int:
    return time.monotonic_ns() // 1000

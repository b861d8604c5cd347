"""Watching the engines: `/health` and `/metrics` at the scrape interval, `/v1/models` rarely.

One loop per engine, so that a slow one delays nobody and no engine ever has two polls in flight. What is seen goes to
a callback as `EngineObserved` or `EngineUnreachable`; what that means is the core's to decide.
"""

from __future__ import annotations

import asyncio
import math
import random
import ssl
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

import httpx2

from conserve_broker import _engine_http
from conserve_broker._config_tables import ScrapeTable
from conserve_broker._engine_connections import EngineConnections
from conserve_broker._engine_http import PLAIN, Door, EngineTrouble
from conserve_broker._incarnation import IncarnationWatch
from conserve_broker.metrics_page import EngineMetrics
from conserve_sdk.core.events import EngineObserved, EngineSpec, EngineUnreachable
from conserve_sdk.core.units import EngineId, Incarnation, ModelName, Ms, Tokens

__all__ = ["Scraper", "next_due_s"]

Emit = Callable[[EngineObserved | EngineUnreachable], None]


class Scraper:
    """Polls a changing set of engines; an async context manager that owns the connections.

    Args:
        settings: interval and timeouts.
        emit: called in the event loop with each observation; must not block. What it raises ends `run`.
        now_ms: the broker's clock; Unix epoch, never going backwards.
        door_of: how each engine is asked.
        transport: replaces the network (tests).
    """

    def __init__(
        self,
        settings: ScrapeTable,
        *,
        emit: Emit,
        now_ms: Callable[[], Ms],
        door_of: Callable[[EngineId], Door] = lambda _: PLAIN,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._settings = settings
        self._emit = emit
        self._now_ms = now_ms
        self._door_of = door_of
        self._transport = transport
        self._ssl_context: ssl.SSLContext | None = None
        self._targets: dict[EngineId, _Target] = {}
        self._removed: list[_Target] = []
        """Their connections are still to be closed."""
        self._group: asyncio.TaskGroup | None = None

    async def __aenter__(self) -> Self:
        """Ready to poll."""
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connections."""
        for target in (*self._targets.values(), *self._removed):
            await target.transport.aclose()

    def configure(self, engines: Sequence[EngineSpec]) -> None:
        """Poll these engines from now on; an engine whose URL is as before goes on undisturbed."""
        wanted = {engine.engine_id: engine for engine in engines}
        for engine_id, target in list(self._targets.items()):
            engine = wanted.get(engine_id)
            if engine is not None and engine.url == target.spec.url:
                target.spec = engine
            else:
                del self._targets[engine_id]
                self._removed.append(target)
                target.stop()
        for engine_id, engine in wanted.items():
            if engine_id not in self._targets:
                self._targets[engine_id] = target = _Target(engine, self.new_transport())
                self._start(target)

    async def run(self) -> None:
        """Poll until cancelled: each engine at once, then once in each interval, at a random phase of its own."""
        try:
            async with asyncio.TaskGroup() as self._group:
                for target in self._targets.values():
                    self._start(target)
                await asyncio.Event().wait()
        finally:
            self._group = None

    async def poll_once(self) -> None:
        """Poll every engine once, all at the same time."""
        async with asyncio.TaskGroup() as group:
            for target in list(self._targets.values()):
                group.create_task(self._poll(target))

    def new_transport(self) -> httpx2.AsyncBaseTransport:
        """Connections to one more engine; whoever asks for them closes them."""
        return self._transport or EngineConnections(self._tls_context)

    def _tls_context(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            self._ssl_context = httpx2.create_ssl_context(trust_env=False)
        return self._ssl_context

    def _start(self, target: _Target) -> None:
        if self._group is not None:
            target.task = self._group.create_task(self._watch(target), name=f"scrape {target.spec.engine_id}")

    async def _watch(self, target: _Target) -> None:
        interval_s = self._settings.interval_ms / 1000
        clock = asyncio.get_running_loop().time
        due_s = clock() + random.uniform(0, interval_s)  # noqa: S311  # spreads the engines over the interval
        try:
            while True:
                await self._poll(target)
                due_s = next_due_s(due_s, now_s=clock(), interval_s=interval_s)
                await asyncio.sleep(due_s - clock())
                due_s += interval_s
        finally:
            if target in self._removed:
                self._removed.remove(target)
                await target.transport.aclose()

    async def _poll(self, target: _Target) -> None:
        timeout_ms = self._settings.timeout_ms
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                event: EngineObserved | EngineUnreachable = await self._observe(target)
        except EngineTrouble as trouble:
            event = self._unreachable(target, str(trouble))
        except TimeoutError:
            event = self._unreachable(target, f"no answer within {timeout_ms} ms")
        except Exception as fault:  # noqa: BLE001  # whatever one engine causes must not end the watch over the others
            event = self._unreachable(target, str(EngineTrouble(f"{type(fault).__name__}: {fault}")))
        if self._targets.get(target.spec.engine_id) is target:  # not removed meanwhile
            self._emit(event)

    def _unreachable(self, target: _Target, detail: str) -> EngineUnreachable:
        target.models_at_ms = None  # whatever comes back may serve something else
        return EngineUnreachable(now_ms=self._now_ms(), engine_id=target.spec.engine_id, detail=detail)

    async def _observe(self, target: _Target) -> EngineObserved:
        url, transport, door = target.spec.url, target.transport, self._door_of(target.spec.engine_id)
        await _engine_http.check_health(transport, url, door)
        page = await _engine_http.get_metrics(transport, url, door)
        if len(page) >= _engine_http.PARSE_ELSEWHERE_BYTES:
            metrics = await asyncio.to_thread(_engine_http.parse, page)
        else:
            metrics = _engine_http.parse(page)
        incarnation = target.watch.observe(metrics)
        if target.models_are_due(incarnation, self._now_ms(), self._settings.models_interval_ms):
            target.models = await _engine_http.get_models(transport, url, door)
            target.models_at_ms, target.models_of = self._now_ms(), incarnation
        return target.observed(metrics, incarnation, self._now_ms())


def next_due_s(due_s: float, *, now_s: float, interval_s: float) -> float:
    """When an engine is polled next: at its due time, or the first one after it that has not passed.

    Whole intervals lie between them, whenever the last poll was: an interval from there would bring all engines
    together for good, once something (the start does) has held all of them up.
    """
    return due_s + interval_s * max(0, math.ceil((now_s - due_s) / interval_s))


class _Target:
    """One engine under watch."""

    def __init__(self, spec: EngineSpec, transport: httpx2.AsyncBaseTransport) -> None:
        self.spec = spec
        self.transport = transport
        self.watch = IncarnationWatch()
        self.models: Mapping[str, int] = {}
        self.models_at_ms: Ms | None = None
        self.models_of: Incarnation | None = None
        self.task: asyncio.Task[None] | None = None

    def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def models_are_due(self, incarnation: Incarnation, now_ms: Ms, interval_ms: int) -> bool:
        if self.models_at_ms is None or self.models_of != incarnation:
            return True
        return now_ms - self.models_at_ms >= interval_ms

    def observed(self, metrics: EngineMetrics, incarnation: Incarnation, now_ms: Ms) -> EngineObserved:
        longest = self.models.get(self.spec.model) or max(self.models.values(), default=0)
        return EngineObserved(
            now_ms=now_ms,
            engine_id=self.spec.engine_id,
            incarnation=incarnation,
            models=tuple(ModelName(model) for model in self.models),
            kv_capacity_tokens=metrics.kv_capacity_tokens,
            kv_used_tokens=metrics.kv_used_tokens,
            block_size_tokens=metrics.block_size_tokens,
            max_model_len_tokens=Tokens(longest),
            running=metrics.running,
            waiting=metrics.waiting,
            prefill_tokens_total=metrics.prefill_tokens_total,
            # prefill_busy_ms_total stays 0: vLLM's request_prefill_time_seconds sums over overlapping requests and is
            # mostly one scheduler step each for follow-up turns, so a rate from it would be far too low.
        )

"""Everything behind a transport: leases, lineages, reports, connections. One per `ConServe` object."""

from __future__ import annotations

import asyncio
import json
import time

import httpx2

from conserve_sdk._bodies import BadBody, kind_of, without_transfer
from conserve_sdk._broker_client import AsyncBrokerClient, SyncBrokerClient
from conserve_sdk._drive import AsyncPerformer, SyncPerformer
from conserve_sdk._fork import call_in_forked_child
from conserve_sdk._lineage import LineageBook
from conserve_sdk._registry import LeaseRegistry
from conserve_sdk._reporter import Reporter
from conserve_sdk._turn import Budget, Flow, LeasePlanner, Opened, TurnFlow, TurnKit, relay_flow
from conserve_sdk.core.units import ConversationId
from conserve_sdk.errors import LeaseClosed
from conserve_sdk.identity import HEADER_SESSION, resolve_conversation, resolve_lineage, resolve_parent
from conserve_sdk.transport._pools import AsyncEnginePool, EnginePool
from conserve_sdk.transport._settings import Settings

__all__ = ["Runtime"]

_NAMING = (b"x-conserve-", HEADER_SESSION.lower().encode("ascii"))


def monotonic_us() -> int:
    """Whole microseconds of `time.monotonic`."""
    return time.monotonic_ns() // 1_000


class Runtime:
    """Builds the parts and turns each request into a flow."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        clock_us = settings.clock_us or monotonic_us
        self._clock_us = clock_us
        self.engines = settings.engine_transport or EnginePool()
        self.async_engines = settings.engine_transport or AsyncEnginePool()
        self.broker = SyncBrokerClient(
            settings.broker_urls, access=settings.access, transport=settings.broker_transport
        )
        self.async_broker = AsyncBrokerClient(
            settings.broker_urls, access=settings.access, transport=settings.broker_transport
        )
        registry = LeaseRegistry()
        self.reporter = Reporter(self.broker, registry, clock=lambda: clock_us() // 1000)
        self.kit = TurnKit(
            registry=registry,
            book=LineageBook(),
            reporter=self.reporter,
            clock_us=clock_us,
            wall_ms=lambda: time.time_ns() // 1_000_000,
            hooks=settings.on_turn,
            planner=settings.planner or LeasePlanner(),
            options=settings.turn_options(),
        )
        self.performer = SyncPerformer(engines=self.engines, broker=self.broker, clock_us=clock_us)
        self.async_performer = AsyncPerformer(engines=self.async_engines, broker=self.async_broker, clock_us=clock_us)
        self.closed = False
        call_in_forked_child(self._after_fork)

    def flow(self, request: httpx2.Request, content: bytes) -> TurnFlow | Flow[Opened] | httpx2.Response:
        """What to do with one request of the application: a turn, a relay, or an answer at once.

        Must run in the context of the application's call, where its conversation is set.

        Raises:
            LeaseClosed: the `ConServe` object was closed.
        """
        if self.closed:
            raise LeaseClosed("this ConServe object was closed: make a new one, or close it later")
        budget = Budget(request.extensions.get("timeout"), timeouts=self.settings.timeouts, clock_us=self._clock_us)
        kind = kind_of(request.method, request.url.path)
        if kind is None:
            conversation = resolve_conversation(_naming(request.headers))
            content = without_transfer(content)
            return relay_flow(self.kit, original=request, content=content, conversation=conversation, budget=budget)
        headers = _naming(request.headers)
        named = resolve_conversation(headers)
        try:
            read = self.kit.prompts.read(kind, content, scope=named)
        except BadBody as bad:
            return _bad_request(str(bad))
        body, digest = read.body, read.digest
        if body.stripped:
            self.kit.warn_once("transfer_params", "took kv_transfer_params out of a request: they are made here only")
        if "prompt_cache_key" in body.options:
            named = resolve_conversation(headers, body.options)
        match = self.kit.book.match(
            named,
            digest,
            explicit_lineage=resolve_lineage(headers),
            previous_response_id=_text(body.options.get("previous_response_id")),
        )
        parent = resolve_parent(headers)
        return TurnFlow(self.kit, original=request, body=body, match=match, digest=digest, budget=budget, parent=parent)

    def idle(self, conversation: ConversationId) -> int:
        """Renew no lease of a conversation until its next turn; returns how many that stopped."""
        return self.kit.registry.idle(conversation, now_ms=self.kit.now_ms())

    def close(self) -> None:
        """Send what is still to be reported and close the connections of blocking code. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self.reporter.close()
        self.broker.close()
        if isinstance(self.engines, EnginePool):
            self.engines.close()

    async def aclose(self) -> None:
        """Close the running loop's connections too. Idempotent."""
        await self.async_broker.aclose()
        if isinstance(self.async_engines, AsyncEnginePool):
            await self.async_engines.aclose()
        # In a thread: it waits for the reports, and the broker may live in this very loop (tests do that).
        await asyncio.to_thread(self.close)

    def _after_fork(self) -> None:
        self.kit.after_fork()


def _naming(headers: httpx2.Headers) -> dict[str, str]:
    """The few headers that may name a conversation: each look into `httpx2.Headers` goes through all of them."""
    named = [name for name, _ in headers.raw if name.lower().startswith(_NAMING)]
    return {name: headers[name] for name in (raw.decode("ascii").lower() for raw in named)}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _bad_request(message: str) -> httpx2.Response:
    """The answer vLLM would give to a body it cannot read, without asking one."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    return httpx2.Response(
        400, headers={"content-type": "application/json"}, content=json.dumps({"error": error}).encode()
    )

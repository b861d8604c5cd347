"""Requests that are no turns: the list of models, a tokenizer call, a stored response."""

from __future__ import annotations

import httpx2

from conserve_sdk._bodies import wire_path
from conserve_sdk._turn.budget import Budget
from conserve_sdk._turn.effects import Flow, Opened, list_engines, open_response
from conserve_sdk._turn.kit import TurnKit
from conserve_sdk._turn.wire import engine_request, engine_target, key_header, read_headers
from conserve_sdk.core.units import ConversationId
from conserve_sdk.errors import EngineUnavailable
from conserve_sdk.protocol import Binding, EngineList

__all__ = ["relay_flow"]


def relay_flow(
    kit: TurnKit, *, original: httpx2.Request, content: bytes, conversation: ConversationId | None, budget: Budget
) -> Flow[Opened]:
    """Send a request that needs no lease to an engine that is known to be there.

    Raises:
        EngineUnavailable: the broker has no engine that is ready.
        BrokerUnavailable: no engine is known here, and no broker answers.
    """
    engine = _known_engine(kit, conversation)
    path = wire_path(original.url.path)
    if engine is None:
        broker_ms = int(kit.options.timeouts.broker_s * 1000)
        engines = yield from list_engines(budget_ms=min(broker_ms, budget.left_ms()))
        engine = _ready_engine(engines)
    if engine is None:
        raise EngineUnavailable(
            f"no engine is ready for {original.method} {path}: see `conserve engines list`, or set fallback_engines"
        )
    target = engine_target(engine.url, path, query=original.url.query)
    kept = read_headers(original.headers).kept
    request = engine_request(
        original, target=target, content=content, timeout=budget.hop(), kept=kept, headers=key_header(engine)
    )
    return (yield from open_response(request))


def _ready_engine(listed: EngineList) -> Binding | None:
    """The first decoder that is ready."""
    ready = (engine for engine in listed.engines if engine.state == "ready" and engine.role != "prefiller")
    first = next(ready, None)
    if first is None:
        return None
    return Binding(engine_id=first.engine_id, url=first.url, incarnation=first.incarnation or "")


def _known_engine(kit: TurnKit, conversation: ConversationId | None) -> Binding | None:
    """The conversation's own decoder (stored responses live there), else any leased one, else a fallback engine."""
    now_ms = kit.now_ms()
    own = kit.registry.views(conversation, now_ms=now_ms) if conversation is not None else ()
    grants = [view.grant for view in own if view.live and view.grant is not None]
    grants = grants or kit.registry.live_grants(now_ms=now_ms)
    if grants:
        return grants[0].decoder
    if kit.options.fallback_engines:
        return kit.fallback_engine(conversation or "", attempt=0)
    return None

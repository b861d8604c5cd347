"""A request to an engine, followed by the turn's hooks from just before it is sent until it is over."""

from __future__ import annotations

import httpx2

from conserve_sdk._turn.effects import Fetched, Flow, Opened, fetch, open_response
from conserve_sdk._turn.ledger import ActiveTurn, error_name
from conserve_sdk.core.units import EngineId
from conserve_sdk.protocol import Binding

__all__ = ["fetch_watched", "open_watched"]

REQUEST_ID = "X-Request-Id"


def fetch_watched(turn: ActiveTurn, engine: Binding, request: httpx2.Request) -> Flow[Fetched]:
    """Send the prefill request; it is over when its answer is here."""
    _begin(turn, engine, request, prefills=True)
    try:
        answer = yield from fetch(request)
    except BaseException as error:
        turn.watch.end_hop(None, error=error_name(error))
        raise
    turn.watch.end_hop(answer.status)
    return answer


def open_watched(turn: ActiveTurn, engine: Binding, request: httpx2.Request) -> Flow[Opened]:
    """Send the decode request; once opened, it goes on to the end of the turn."""
    _begin(turn, engine, request, prefills=False)
    try:
        return (yield from open_response(request))
    except BaseException as error:
        turn.watch.end_hop(None, error=error_name(error))
        raise


def _begin(turn: ActiveTurn, engine: Binding, request: httpx2.Request, *, prefills: bool) -> None:
    turn.watch.begin_hop(
        phase="prefill" if prefills else "decode",
        engine_id=EngineId(engine.engine_id),
        url=str(request.url),
        headers=request.headers,
        request_id=request.headers[REQUEST_ID],
    )

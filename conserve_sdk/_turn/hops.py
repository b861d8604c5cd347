"""A request to an engine, followed by the turn's hooks from just before it is sent until it is over."""

from __future__ import annotations

from typing import NamedTuple

import httpx2

from conserve_sdk._turn.effects import Fetched, Flow, Opened, fetch, open_response
from conserve_sdk._turn.ledger import ActiveTurn, error_name
from conserve_sdk.core.units import EngineId
from conserve_sdk.protocol import Binding

__all__ = ["REQUEST_ID", "EngineRequest", "fetch_watched", "open_watched"]

REQUEST_ID = "X-Request-Id"


class EngineRequest(NamedTuple):
    """A request to an engine, with what hooks are told about it: looking it up again would take longer than this."""

    http: httpx2.Request
    url: str
    request_id: str


def fetch_watched(turn: ActiveTurn, engine: Binding, request: EngineRequest) -> Flow[Fetched]:
    """Send the prefill request; it is over when its answer is here."""
    _begin(turn, engine, request, prefills=True)
    try:
        answer = yield from fetch(request.http)
    except BaseException as error:
        turn.watch.end_hop(None, error=error_name(error))
        raise
    turn.watch.end_hop(answer.status)
    return answer


def open_watched(turn: ActiveTurn, engine: Binding, request: EngineRequest) -> Flow[Opened]:
    """Send the decode request; once opened, it goes on to the end of the turn."""
    _begin(turn, engine, request, prefills=False)
    try:
        return (yield from open_response(request.http))
    except BaseException as error:
        turn.watch.end_hop(None, error=error_name(error))
        raise


def _begin(turn: ActiveTurn, engine: Binding, request: EngineRequest, *, prefills: bool) -> None:
    turn.watch.begin_hop(
        phase="prefill" if prefills else "decode",
        engine_id=EngineId(engine.engine_id),
        url=request.url,
        headers=request.http.headers,
        request_id=request.request_id,
    )

"""The desk itself: one call or event in, one outcome out."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from conserve_sdk._desk.outcome import Call, Outcome, Reply
from conserve_sdk._desk.problems import ProblemRaised, bad_body, too_large
from conserve_sdk._desk.routes import Route
from conserve_sdk._desk.visit import NewId, Visit
from conserve_sdk.core import Broker
from conserve_sdk.core.events import Event
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import RequestId
from conserve_sdk.protocol import BODY_BYTES_MAX
from conserve_sdk.tokens import TokenSigner


class Desk:
    """Serves the route table over one `core.Broker`. Not thread-safe: exactly one owner calls it.

    Args:
        core: the state machine; nobody else may apply events to it.
        settings: what `core` was built with.
        signer: signs and checks lease tokens.
        new_id: makes ids nobody can guess; called with ``"lease"`` or ``"request"``.
    """

    def __init__(self, core: Broker, *, settings: BrokerSettings, signer: TokenSigner, new_id: NewId) -> None:
        self.core = core
        self._preset = settings.placement.name
        self._signer = signer
        self._new_id = new_id

    def handle(self, route: Route[Any], call: Call) -> Outcome:
        """Serves one request. Problems are answers like any other: nothing is raised for a client's mistake."""
        visit = self._visit(call)
        result: Reply | RequestId
        try:
            result = route.handle(visit, _body_of(route, call.raw))
        except ProblemRaised as problem:
            result = problem.reply
        return visit.outcome(result)

    def feed(self, *events: Event) -> Outcome:
        """Applies events that no client sent: observations, configuration, timers, recovery, cancelled requests."""
        visit = self._visit(Call(now_ms=events[0].now_ms))
        for event in events:
            visit.apply(event)
        return visit.outcome(None)

    def _visit(self, call: Call) -> Visit:
        return Visit(self.core, signer=self._signer, new_id=self._new_id, call=call, preset=self._preset)


def _body_of(route: Route[Any], raw: bytes) -> Any:
    model = route.body or route.query
    if model is None:
        return None
    if len(raw) > BODY_BYTES_MAX:
        raise too_large(BODY_BYTES_MAX)
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise bad_body(error) from error

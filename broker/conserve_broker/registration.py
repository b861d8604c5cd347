"""Engines that announce themselves: `PUT /v1/engines/{id}` again and again, `DELETE` at the end.

Off unless `[registration] allow` says which URLs may be announced: the broker, and every agent, will call them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conserve_broker._discovery_tables import RegistrationTable, engine_of
from conserve_broker._url_guard import UrlGuard
from conserve_broker.membership import Membership
from conserve_sdk._desk import ProblemRaised, Reply, Route, engine_info
from conserve_sdk.core.units import EngineId, Incarnation
from conserve_sdk.protocol import EngineInfo, EngineRegistration, Problem

__all__ = ["registration_routes"]


def registration_routes(settings: RegistrationTable, membership: Callable[[], Membership]) -> tuple[Route[Any], ...]:
    """The two routes, over whatever engines there are at the time of a request."""
    guard = UrlGuard(settings.allow)

    def register(visit: Any, body: EngineRegistration) -> Reply:
        """`PUT /v1/engines/{id}`: the same again is a heartbeat; after `ttl_ms` without one the engine is given up."""
        _demand_enabled(settings)
        keys = body.model_dump(exclude={"url", "ttl_ms", "incarnation"}, exclude_none=True)
        try:
            engine = engine_of(visit.call.target, body.url, keys)
        except ValueError as error:
            raise _problem(422, "bad_request", "Invalid registration", str(error)) from None
        if not guard.allows(engine.url):
            raise _problem(
                403,
                "engine_not_allowed",
                "Engine not allowed",
                f"{engine.url} is not among the URLs of [registration] allow; add a network or a pattern for it",
            )
        members, spec = membership(), engine.spec()
        trouble = members.conflict(spec)
        if trouble:
            raise _problem(409, "engine_conflict", "Engine conflict", f"{trouble}; choose another id, or remove it")
        known = members.is_registered(spec.engine_id)
        members.register(spec, ttl_ms=body.ttl_ms, incarnation=Incarnation(body.incarnation))
        return Reply(status=200 if known else 201, body=_info(visit, spec.engine_id))

    def deregister(visit: Any, _: None) -> Reply:
        """`DELETE /v1/engines/{id}`: it gets no new lease and goes with its last one. Idempotent."""
        _demand_enabled(settings)
        membership().deregister(EngineId(visit.call.target))
        return Reply(status=204)

    return (
        Route(
            method="PUT",
            path="/v1/engines/{engine_id}",
            name="register_engine",
            summary="Announce an engine, or say that it is still there",
            handle=register,
            body=EngineRegistration,
            answer=EngineInfo,
            statuses=(200, 201),
            problems=(403, 409),
            scopes=("worker",),
        ),
        Route(
            method="DELETE",
            path="/v1/engines/{engine_id}",
            name="deregister_engine",
            summary="Take a registered engine out: it goes with its last lease",
            handle=deregister,
            statuses=(204,),
            problems=(403,),
            scopes=("worker",),
        ),
    )


def _info(visit: Any, engine_id: EngineId) -> EngineInfo:
    view = next(view for view in visit.core.engines() if view.spec.engine_id == engine_id)
    return engine_info(view, now_ms=visit.now_ms)


def _demand_enabled(settings: RegistrationTable) -> None:
    if not settings.allow:
        raise _problem(
            403,
            "registration_disabled",
            "Registration is off",
            "engines are named in the broker's configuration; to let them register set [registration] allow",
        )


def _problem(status: int, code: str, title: str, detail: str) -> ProblemRaised:
    return ProblemRaised(Problem(title=title, status=status, detail=detail, code=code))

"""The route table: what both shells serve, and what the OpenAPI document lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import unquote

from pydantic import BaseModel

from conserve_sdk._desk import batches, fleet, leases, listing
from conserve_sdk._desk.outcome import Reply
from conserve_sdk._desk.problems import no_route
from conserve_sdk._desk.visit import Visit
from conserve_sdk.core.units import RequestId
from conserve_sdk.protocol import (
    AdviceInfo,
    BatchAnswer,
    EngineInfo,
    EngineList,
    FleetInfo,
    LeaseExplanation,
    LeaseGrant,
    LeaseList,
    LeaseQuery,
    LeaseRequest,
    LeaseStatus,
    RenewalBatch,
    ReportBatch,
    SupersedeRequest,
    TokenBody,
)

BodyT = TypeVar("BodyT")

Scope = Literal["agent", "worker", "admin"]
"""What an API key is for: conversations, being an engine of the fleet, or running it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route(Generic[BodyT]):
    """One route of the protocol.

    Attributes:
        path: as FastAPI writes it; at most one parameter, which becomes `Call.target`.
        body: wire model of the request body, None for none.
        query: wire model of the query, None for none. It reaches the desk in place of a body; see `query_as_body`.
        answer: wire model of a good answer, None for an empty one.
        statuses: statuses of a good answer, the usual one first.
        problems: statuses of problem documents it may answer besides those of every route.
        holder: whether the caller proves by the lease's token in a header that it holds the lease.
        scopes: whose keys may ask, besides those of scope `admin`, which may ask everything.
        whole: whether the answer needs all of the lease's receipt, whose candidates a journal may have put aside.
    """

    method: str
    path: str
    name: str
    summary: str
    handle: Callable[[Visit, BodyT], Reply | RequestId]
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    statuses: tuple[int, ...] = (200,)
    problems: tuple[int, ...] = ()
    holder: bool = False
    scopes: tuple[Scope, ...] = ()
    whole: bool = False

    def target_of(self, path: str) -> str | None:
        """The value of the path's parameter ("" where there is none), or None when `path` is not this route's."""
        pattern, parts = self.path.split("/"), path.split("/")
        if len(pattern) != len(parts):
            return None
        target = ""
        for expected, part in zip(pattern, parts, strict=True):
            if expected.startswith("{") and part:
                target = unquote(part)
            elif expected != part:
                return None
        return target


_GRANT_PROBLEMS = (404, 422, 429, 503)

ROUTES: tuple[Route[Any], ...] = (
    Route(
        method="POST",
        path="/v1/leases",
        name="request_lease",
        summary="Ask for a lease; a live lease of the same key is answered as it is",
        handle=leases.request_lease,
        body=LeaseRequest,
        answer=LeaseGrant,
        statuses=(201, 200),
        problems=_GRANT_PROBLEMS,
        scopes=("agent",),
    ),
    Route(
        method="GET",
        path="/v1/leases",
        name="list_leases",
        summary="List live leases, a page at a time",
        handle=listing.list_leases,
        query=LeaseQuery,
        answer=LeaseList,
        problems=(422,),
    ),
    Route(
        method="GET",
        path="/v1/leases/{lease_id}",
        name="read_lease",
        summary="Read a live lease as its holder",
        handle=leases.read_lease,
        answer=LeaseGrant,
        problems=(401, 404, 409),
        holder=True,
        scopes=("agent",),
    ),
    Route(
        method="DELETE",
        path="/v1/leases/{lease_id}",
        name="release_lease",
        summary="Release a lease: the conversation is over",
        handle=leases.release_lease,
        statuses=(204,),
        problems=(401, 404),
        holder=True,
        scopes=("agent",),
    ),
    Route(
        method="POST",
        path="/v1/leases/{lease_id}/supersede",
        name="supersede_lease",
        summary="Replace a lease by one of the next epoch (compare-and-set on the epoch)",
        handle=leases.supersede_lease,
        body=SupersedeRequest,
        answer=LeaseGrant,
        statuses=(201, 200),
        problems=(401, *_GRANT_PROBLEMS),
        scopes=("agent",),
    ),
    Route(
        method="POST",
        path="/v1/leases/{lease_id}/park",
        name="park_lease",
        summary="Shorten a lease's life while its conversation waits for a human",
        handle=leases.park_lease,
        body=TokenBody,
        answer=LeaseStatus,
        problems=(401, 404),
        scopes=("agent",),
    ),
    Route(
        method="GET",
        path="/v1/leases/{lease_id}/explain",
        name="explain_lease",
        summary="Why a lease stands where it does",
        handle=leases.explain_lease,
        answer=LeaseExplanation,
        problems=(404,),
        scopes=("agent",),
        whole=True,
    ),
    Route(
        method="POST",
        path="/v1/reports",
        name="take_reports",
        summary="Report turns and engine failures in a batch; each report renews its lease",
        handle=batches.take_reports,
        body=ReportBatch,
        answer=BatchAnswer,
        scopes=("agent",),
    ),
    Route(
        method="POST",
        path="/v1/renewals",
        name="renew_leases",
        summary="Renew leases in a batch",
        handle=batches.renew_leases,
        body=RenewalBatch,
        answer=BatchAnswer,
        scopes=("agent",),
    ),
    Route(
        method="GET",
        path="/v1/engines",
        name="list_engines",
        summary="List the engines as the broker sees them",
        handle=fleet.list_engines,
        answer=EngineList,
        scopes=("agent", "worker"),
    ),
    Route(
        method="GET",
        path="/v1/engines/{engine_id}",
        name="read_engine",
        summary="Read one engine",
        handle=fleet.read_engine,
        answer=EngineInfo,
        problems=(404,),
        scopes=("agent", "worker"),
    ),
    Route(
        method="POST",
        path="/v1/engines/{engine_id}/drain",
        name="drain_engine",
        summary="Drain an engine: it keeps its leases and gets no new one",
        handle=fleet.drain_engine,
        answer=EngineInfo,
        problems=(404,),
    ),
    Route(
        method="POST",
        path="/v1/engines/{engine_id}/undrain",
        name="undrain_engine",
        summary="Let a drained engine take leases again",
        handle=fleet.undrain_engine,
        answer=EngineInfo,
        problems=(404,),
    ),
    Route(
        method="GET",
        path="/v1/fleet",
        name="read_fleet",
        summary="The fleet, its leases and the broker's main counters",
        handle=fleet.read_fleet,
        answer=FleetInfo,
        scopes=("agent",),
    ),
    Route(
        method="GET",
        path="/v1/advice",
        name="read_advice",
        summary="Which preset and how many prefillers the observed figures call for, and why",
        handle=fleet.read_advice,
        answer=AdviceInfo,
    ),
)


def find_route(method: str, path: str) -> tuple[Route[Any], str]:
    """The route of a request and the value of its path parameter.

    Raises:
        ProblemRaised: 404 for an unknown path, 405 for another method on a known one.
    """
    allowed: list[str] = []
    for route in ROUTES:
        target = route.target_of(path)
        if target is None:
            continue
        if route.method == method:
            return route, target
        allowed.append(route.method)
    raise no_route(method, path, allowed)

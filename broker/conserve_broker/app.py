"""The HTTP face of the broker: the desk's route table on FastAPI, for its OpenAPI document, without its overhead.

`FastRoute` reads the body's bytes and writes the answer's bytes; pydantic checks both once, in the desk. Measured, that
removes most of what FastAPI costs above Starlette, and the generated document stays. Routes without a parameter, among
them all that a busy broker is asked for, are found before FastAPI looks at a request. `Depends` runs on none of them:
who asks, and whether they may, is decided by the gate before a body is read.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Header, Query
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from conserve_broker.dashboard import add_dashboard
from conserve_broker.feed import EventStream, Feed
from conserve_broker.gate import Gate
from conserve_broker.logbook import trace_id
from conserve_broker.metrics import METRICS_MEDIA_TYPE, BrokerMetrics
from conserve_broker.service import Readiness, Waiter
from conserve_broker.snapshot import HistoryInfo, Snapshot
from conserve_broker.tracing import RequestSpan, Tracing
from conserve_sdk._desk import (
    ROUTES,
    ProblemRaised,
    Reply,
    Route,
    lease_token_in,
    no_route,
    query_as_body,
    too_large,
)
from conserve_sdk.core.units import EngineId, TenantId
from conserve_sdk.protocol import BODY_BYTES_MAX, LEASE_HEADER, PROBLEM_MEDIA_TYPE, Binding, LeaseGrant, Problem

__all__ = ["Answering", "create_app"]


class Answering(Protocol):
    """What answers the requests: a `BrokerService`, or the `Front` of a broker."""

    async def handle(
        self,
        route: Route[Any],
        *,
        tenant: TenantId,
        every_tenant: bool = True,
        target: str = "",
        lease_token: str = "",
        raw: bytes = b"",
    ) -> Reply | Waiter:
        """Serve one request: its answer, durable, or a waiter when it has to queue for admission."""

    def readiness(self) -> Readiness:
        """Whether new conversations can be served, and why not."""


_SECURITY_SCHEMES = {
    "api_key": {"type": "http", "scheme": "bearer", "description": "An API key; not asked for where none is configured"}
}
_CLIENT_CLOSED_REQUEST = 499
"""Nobody reads it; it only tells the access log why there was no answer (nginx's number)."""


def create_app(
    service: Answering,
    *,
    metrics: BrokerMetrics | None = None,
    gate: Gate | None = None,
    engine_key: Callable[[EngineId], str] = lambda _: "",
    more_routes: Sequence[Route[Any]] = (),
    feed: Feed | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The ASGI application over a service.

    Args:
        service: started and stopped by the caller.
        metrics: what `/metrics` shows.
        gate: decides who asks and whether they may; everybody may do everything without it.
        engine_key: an engine's own API key, for callers who get it; "" for none.
        more_routes: served beside those of the desk.
        feed: what `/v1/events` and the dashboard at `/` show; neither is there without it.
        tracing: makes spans of requests; none without it.
    """
    gate = gate or Gate()
    serve = _Server(service, gate, engine_key, tracing)
    app = _App(
        serve,
        [*ROUTES, *more_routes],
        title="ConServe broker",
        summary="Conversation leases for agents on vLLM fleets",
        version=version("conserve-sdk"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: _http_problem, Exception: _crash},
    )
    _add_probes(app, service, metrics, gate)
    if feed is not None:
        _add_events(app, feed, gate)
        add_dashboard(app)
    _say_problem_json(app)
    return app


class _App(FastAPI):
    """FastAPI with a shorter way to the routes whose path is always the same."""

    def __init__(self, serve: _Server, routes: Sequence[Route[Any]], **options: Any) -> None:
        super().__init__(**options)
        self._serve = serve
        self._direct = {(route.method, route.path): route for route in routes if "{" not in route.path}
        self.router.routes.extend(_fast_route(route, serve) for route in routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        route = self._direct.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await super().__call__(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await self._serve(route, request)
        except Exception as error:
            await (await _crash(request, error))(scope, receive, send)
            raise  # to the server, which logs it
        await response(scope, receive, send)


class _Server:
    """Carries one request from Starlette to the service and back."""

    def __init__(
        self, service: Answering, gate: Gate, engine_key: Callable[[EngineId], str], tracing: Tracing | None
    ) -> None:
        self._service = service
        self._gate = gate
        self._engine_key = engine_key
        self._tracing = tracing

    async def __call__(self, route: Route[Any], request: Request) -> Response:
        if self._tracing is None:
            trace_id.set(_trace_of(request))
            return await self._serve(route, request, None)
        with self._tracing.request(route.name, request.headers) as span:
            trace_id.set(_trace_of(request) if span is None else span.trace_id)
            return await self._serve(route, request, span)

    async def _serve(self, route: Route[Any], request: Request, span: RequestSpan | None) -> Response:
        try:
            caller = self._gate.admit(request.headers, *route.scopes)
            raw = await _raw(route, request)
        except ProblemRaised as problem:
            return _response(problem.reply)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        answer = await self._service.handle(
            route,
            tenant=caller.tenant,
            every_tenant=caller.every_tenant,
            target=next(iter(request.path_params.values()), ""),
            lease_token=lease_token_in(request.headers) if route.holder else "",
            raw=raw,
        )
        reply: Reply | None
        if isinstance(answer, Waiter):
            with nullcontext() if self._tracing is None else self._tracing.waiting():
                reply = await _waited(answer, request)
        else:
            reply = answer
        if reply is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        if span is not None:
            span.answered(reply)
        if self._gate.shares_engine_keys(caller) and isinstance(reply.body, LeaseGrant):
            reply = replace(reply, body=self._with_keys(reply.body))
        return _response(reply)

    def _with_keys(self, grant: LeaseGrant) -> LeaseGrant:
        """Only here, on its way out, does a lease hold the keys of its engines."""

        def with_key(engine: Binding) -> Binding:
            return engine.model_copy(update={"api_key": self._engine_key(EngineId(engine.engine_id)) or None})

        prefiller = None if grant.prefiller is None else with_key(grant.prefiller)
        return grant.model_copy(update={"decoder": with_key(grant.decoder), "prefiller": prefiller})


async def _waited(waiter: Waiter, request: Request) -> Reply | None:
    """Wait for admission and for the client's patience, whichever ends first; None: the client left."""
    reply, gone = asyncio.ensure_future(waiter.reply()), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({reply, gone}, return_when=asyncio.FIRST_COMPLETED)
        return reply.result() if reply.done() else None
    finally:
        if not reply.done():
            waiter.cancel()
        for task in (reply, gone):
            task.cancel()
        await asyncio.gather(reply, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def _trace_of(request: Request) -> str:
    """The trace of the caller (W3C Trace Context), for the log; empty without a good `traceparent`."""
    found = _TRACEPARENT.fullmatch(request.headers.get("traceparent", ""))
    return "" if found is None else found[1]


async def _raw(route: Route[Any], request: Request) -> bytes:
    if route.query is not None:
        return query_as_body(request.query_params.multi_items())
    return b"" if route.body is None else await _body(request)


async def _body(request: Request) -> bytes:
    """The whole body, given up as soon as it is too long, whatever its header claims."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_BYTES_MAX:
            raise too_large(BODY_BYTES_MAX)
        parts.append(part)
    return b"".join(parts)


def _response(reply: Reply) -> Response:
    return Response(reply.content(), status_code=reply.status, headers=reply.headers)


# ---- routes and their OpenAPI -----------------------------------------------------------------------------------


def _fast_route(route: Route[Any], serve: Callable[[Route[Any], Request], Awaitable[Response]]) -> APIRoute:
    class FastRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            async def handler(request: Request) -> Response:
                return await serve(route, request)

            return handler

    usual, *others = route.statuses
    responses: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in _problem_statuses(route)}
    for status in others:
        known = "It was not known before" if status == 201 else "The lease was live already"
        responses[status] = {"model": route.answer, "description": known}
    return FastRoute(
        route.path,
        _documented(route),
        methods=[route.method],
        name=route.name,
        operation_id=route.name,
        summary=route.summary,
        tags=[route.path.split("/")[2]],
        response_model=route.answer,
        status_code=usual,
        responses=responses,
        openapi_extra={"x-scopes": [*route.scopes, "admin"]},
    )


def _problem_statuses(route: Route[Any]) -> list[int]:
    of_body = {400, 413, 422} if route.body is not None else set()
    return sorted({*route.problems, *of_body, 401, 403, 429, 503})


def _documented(route: Route[Any]) -> Callable[..., Any]:
    """A function whose signature tells FastAPI what to write into the document; it is never called."""

    def endpoint(**_: Any) -> None:
        raise AssertionError("FastRoute answers")

    parameters = [
        inspect.Parameter(part.strip("{}"), inspect.Parameter.KEYWORD_ONLY, annotation=str)
        for part in route.path.split("/")
        if part.startswith("{")
    ]
    if route.body is not None:
        parameters.append(inspect.Parameter("body", inspect.Parameter.KEYWORD_ONLY, annotation=route.body))
    if route.query is not None:
        query = Annotated[route.query, Query()]  # type: ignore[name-defined]  # a class that is known at run time only
        parameters.append(inspect.Parameter("query", inspect.Parameter.KEYWORD_ONLY, annotation=query))
    if route.holder:
        holder = Annotated[
            str, Header(alias=LEASE_HEADER, description="The lease's token: proves that the caller holds the lease")
        ]
        parameters.append(inspect.Parameter("lease", inspect.Parameter.KEYWORD_ONLY, annotation=holder))
    endpoint.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    endpoint.__doc__ = route.handle.__doc__
    return endpoint


def _say_problem_json(app: FastAPI) -> None:
    """Correct what FastAPI cannot be told: the media type of problems, and that it answers no 422 of its own."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"] = dict(map(_as_problem, operation["responses"].items()))
                    operation["responses"].pop("", None)
                    if "x-scopes" in operation:
                        operation["security"] = [{"api_key": []}, {}]
            for unused in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(unused, None)
            document["components"]["securitySchemes"] = _SECURITY_SCHEMES
        assert app.openapi_schema is not None, "generating keeps the document"
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _as_problem(item: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """A response as it really is; under the status "" when it never comes."""
    status, response = item
    content = response.get("content", {}).get("application/json")
    kind = "" if content is None else content["schema"].get("$ref", "").rpartition("/")[2]
    if kind not in {"Problem", "HTTPValidationError"}:
        return item
    if kind == "HTTPValidationError":
        return "", response
    return status, {**response, "content": {PROBLEM_MEDIA_TYPE: content}}


class ReadinessInfo(BaseModel):
    """Answer to `GET /readyz`.

    Attributes:
        role: `alone`, or `leader` or `standby` among replicas.
        access: `keys` where callers need one, else `open`.
        reasons: why no new conversation can be served here; empty when ready.
        warnings: what somebody should look at all the same.
    """

    ready: bool
    role: str
    access: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]


# ---- probes -----------------------------------------------------------------------------------------------------


def _add_probes(app: FastAPI, service: Answering, metrics: BrokerMetrics | None, gate: Gate) -> None:
    @app.get("/healthz", tags=["probes"], summary="The process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["probes"],
        summary="New conversations can be served, or why not",
        responses={200: {"model": ReadinessInfo}, 503: {"model": ReadinessInfo}},
    )
    async def readyz(standby: str = "") -> JSONResponse:
        """With `?standby=ok` a standby that could lead at once is ready, too (for orchestrators, not for clients)."""
        state = service.readiness()
        told = ReadinessInfo(
            ready=state.ready,
            role=state.role,
            access="keys" if gate.closed else "open",
            reasons=state.reasons,
            warnings=state.warnings,
        )
        good = state.ready or (standby == "ok" and state.can_lead)
        return JSONResponse(told.model_dump(), status_code=200 if good else 503)

    if metrics is not None:

        @app.get("/metrics", tags=["probes"], summary="Prometheus metrics", response_class=Response)
        async def metrics_page(request: Request) -> Response:
            if gate.guards_metrics:
                try:
                    gate.admit(request.headers)
                except ProblemRaised as problem:
                    return _response(problem.reply)
            return Response(metrics.page(), media_type=METRICS_MEDIA_TYPE)


# ---- events -----------------------------------------------------------------------------------------------------


def _add_events(app: FastAPI, feed: Feed, gate: Gate) -> None:
    @app.get(
        "/v1/events",
        operation_id="read_events",
        tags=["events"],
        summary="The broker's state once a second, as server-sent events",
        response_class=Response,
        response_model=None,
        responses={
            200: {
                "description": "Events `history` (once, first) and `snapshot` (whole, with an id); comments in between",
                "content": {"text/event-stream": {"schema": {"anyOf": [_schema(HistoryInfo), _schema(Snapshot)]}}},
            },
            401: {"model": Problem},
            403: {"model": Problem},
            429: {"model": Problem},
            503: {"model": Problem},
        },
        openapi_extra={"x-scopes": ["admin"]},
    )
    async def read_events(
        request: Request,
        last_event_id: Annotated[str, Header(description="Of the last event seen: it is not sent again")] = "",
    ) -> Response:
        try:
            gate.admit(request.headers)
        except ProblemRaised as problem:
            return _response(problem.reply)
        return EventStream(feed, last_event_id=last_event_id)


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model that is no answer of a route of its own, with its parts inside."""
    return model.model_json_schema(ref_template="#/components/schemas/{model}")


# ---- problems of the framework ----------------------------------------------------------------------------------


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it alone"
    allowed = (error.headers or {}).get("Allow", "")
    methods = [method.strip() for method in allowed.split(",") if method.strip()]
    response = _response(no_route(request.method, request.url.path[:200], methods).reply)
    if allowed:
        response.headers["allow"] = allowed
    return response


async def _crash(_: Request, error: Exception) -> Response:
    """The server logs the traceback; the client learns that it was not its mistake."""
    problem = Problem(
        title="Internal error",
        status=500,
        detail=f"the broker failed on this request ({type(error).__name__}); its log has the traceback",
        code="internal_error",
    )
    return _response(Reply(status=500, body=problem))

"""The HTTP face of the broker: the desk's route table on FastAPI, for its OpenAPI document, without its overhead.

`FastRoute` reads the body's bytes and writes the answer's bytes; pydantic checks both once, in the desk. Measured, that
removes most of what FastAPI costs above Starlette, and the generated document stays. `Depends` does not run on such
routes: who asks is decided by `create_app`'s `tenant_of`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, Header
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from conserve_broker.metrics import METRICS_MEDIA_TYPE, BrokerMetrics
from conserve_broker.service import Readiness, Waiter
from conserve_sdk._desk import ROUTES, ProblemRaised, Reply, Route, no_route, too_large
from conserve_sdk.core.units import TenantId
from conserve_sdk.protocol import BODY_BYTES_MAX, LEASE_SCHEME, PROBLEM_MEDIA_TYPE, Problem

__all__ = ["Answering", "TenantOf", "create_app"]


class Answering(Protocol):
    """What answers the requests: a `BrokerService`, or the `Front` of a broker."""

    async def handle(
        self, route: Route[Any], *, tenant: TenantId, target: str = "", lease_token: str = "", raw: bytes = b""
    ) -> Reply | Waiter:
        """Serve one request: its answer, durable, or a waiter when it has to queue for admission."""

    def readiness(self) -> Readiness:
        """Whether new conversations can be served, and why not."""


TenantOf = Callable[[Request], TenantId]
"""Decides for which tenant a request speaks."""

_CLIENT_CLOSED_REQUEST = 499
"""Nobody reads it; it only tells the access log why there was no answer (nginx's number)."""


def create_app(
    service: Answering,
    *,
    metrics: BrokerMetrics | None = None,
    tenant_of: TenantOf | None = None,
    more_routes: Sequence[Route[Any]] = (),
) -> FastAPI:
    """The ASGI application over a service.

    Args:
        service: started and stopped by the caller.
        metrics: what `/metrics` shows.
        tenant_of: the tenant of a request; everybody is ``default`` without it.
        more_routes: served beside those of the desk.
    """
    app = FastAPI(
        title="ConServe broker",
        summary="Conversation leases for agents on vLLM fleets",
        version=version("conserve-sdk"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: _http_problem, Exception: _crash},
    )
    serve = _Server(service, tenant_of or (lambda _: TenantId("default")))
    for route in (*ROUTES, *more_routes):
        app.router.routes.append(_fast_route(route, serve))
    _add_probes(app, service, metrics)
    _say_problem_json(app)
    return app


class _Server:
    """Carries one request from Starlette to the service and back."""

    def __init__(self, service: Answering, tenant_of: TenantOf) -> None:
        self._service = service
        self._tenant_of = tenant_of

    async def __call__(self, route: Route[Any], request: Request) -> Response:
        try:
            raw = await _body(request) if route.body is not None else b""
        except ProblemRaised as problem:
            return _response(problem.reply)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        answer = await self._service.handle(
            route,
            tenant=self._tenant_of(request),
            target=next(iter(request.path_params.values()), ""),
            lease_token=token if scheme == LEASE_SCHEME else "",
            raw=raw,
        )
        if isinstance(answer, Waiter):
            return await _wait(answer, request)
        return _response(answer)


async def _wait(waiter: Waiter, request: Request) -> Response:
    """Wait for admission and for the client's patience, whichever ends first."""
    reply, gone = asyncio.ensure_future(waiter.reply()), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({reply, gone}, return_when=asyncio.FIRST_COMPLETED)
        if reply.done():
            return _response(reply.result())
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    finally:
        if not reply.done():
            waiter.cancel()
        for task in (reply, gone):
            task.cancel()
        await asyncio.gather(reply, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    )


def _problem_statuses(route: Route[Any]) -> list[int]:
    of_body = {400, 413, 422} if route.body is not None else set()
    return sorted({*route.problems, *of_body, 503})


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
    if route.holder:
        holder = Annotated[str, Header(description="`Lease <token>`: proves that the caller holds the lease")]
        parameters.append(inspect.Parameter("authorization", inspect.Parameter.KEYWORD_ONLY, annotation=holder))
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
            for unused in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(unused, None)
        assert app.openapi_schema is not None, "generating keeps the document"
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _as_problem(item: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """A response as it really is; under the status "" when it never comes."""
    status, response = item
    content = response.get("content", {}).get("application/json")
    if content is None or not status.startswith(("4", "5")):
        return item
    if content["schema"].get("$ref", "").endswith("/HTTPValidationError"):
        return "", response
    return status, {**response, "content": {PROBLEM_MEDIA_TYPE: content}}


# ---- probes -----------------------------------------------------------------------------------------------------


def _add_probes(app: FastAPI, service: Answering, metrics: BrokerMetrics | None) -> None:
    @app.get("/healthz", tags=["probes"], summary="The process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", tags=["probes"], summary="New conversations can be served")
    async def readyz(standby: Literal["", "ok"] = "") -> JSONResponse:
        """With `?standby=ok` a standby that could lead at once is ready, too (for orchestrators, not for clients)."""
        state = service.readiness()
        good = state.ready or (bool(standby) and state.can_lead)
        body = {"ready": state.ready, "role": state.role, "reasons": state.reasons, "warnings": state.warnings}
        return JSONResponse(body, status_code=200 if good else 503)

    if metrics is not None:

        @app.get("/metrics", tags=["probes"], summary="Prometheus metrics", response_class=Response)
        async def metrics_page() -> Response:
            return Response(metrics.page(), media_type=METRICS_MEDIA_TYPE)


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

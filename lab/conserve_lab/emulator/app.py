"""The routes of one emulated engine."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from conserve_lab.emulator.chat import chat_prompt, read_chat
from conserve_lab.emulator.completions import read_completion
from conserve_lab.emulator.errors import ApiError
from conserve_lab.emulator.faults import FaultOrder
from conserve_lab.emulator.fields import Body, Served, check_model
from conserve_lab.emulator.generation import Call, Run
from conserve_lab.emulator.http import DONE, ClientGone, EventStream, dump_json, error_response, sse, until_gone
from conserve_lab.emulator.incarnation import Incarnation
from conserve_lab.emulator.language import SchemaUnsatisfiable, text_of, text_tokens
from conserve_lab.emulator.language.tokens import new_tokens
from conserve_lab.emulator.metrics import MetricsSource, metrics_page
from conserve_lab.emulator.records import RequestRecord
from conserve_lab.emulator.responses import read_responses

VLLM_VERSION = "0.32.0"
_CLIENT_GONE = 499


class Host(Protocol):
    """What the routes need to know of the engine they belong to."""

    @property
    def live(self) -> Incarnation:
        """The running incarnation."""

    def record(self, entry: RequestRecord) -> None:
        """Remember a request."""

    def records(self) -> list[RequestRecord]:
        """Return the requests remembered."""

    def drop(self, scope: Scope) -> None:
        """Cut the connection of a request."""

    async def order(self, order: FaultOrder) -> None:
        """Carry out a fault order."""

    async def kill(self) -> None:
        """Die."""


class Reader(Protocol):
    """Reads one API's request bodies."""

    def __call__(self, body: Body, *, served: Served, request_id: str, session_id: str | None) -> Call:
        """Return the request.

        Raises:
            ApiError: It is malformed.
        """


@dataclass(slots=True)
class _Note:
    """What is known about a request so far, for its record."""

    path: str
    request_id: str
    session_id: str | None
    incarnation: Incarnation
    call: Call | None = None
    run: Run | None = None


def build_app(host: Host) -> Starlette:
    """Return the ASGI application of an engine."""
    routes = _Routes(host)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.generator(read_chat), methods=["POST"]),
            Route("/v1/completions", routes.generator(read_completion), methods=["POST"]),
            Route("/v1/responses", routes.generator(read_responses), methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
            Route("/version", routes.version),
            Route("/health", routes.health),
            Route("/ping", routes.health, methods=["GET", "POST"]),
            Route("/load", routes.load),
            Route("/metrics", routes.metrics),
            Route("/emulator/state", routes.state),
            Route("/emulator/requests", routes.requests),
            Route("/emulator/faults", routes.faults, methods=["GET", "POST"]),
        ],
        exception_handlers={ApiError: _show_error},
    )


async def _show_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


class _Routes:
    def __init__(self, host: Host) -> None:
        self._host = host

    # ---- generation ----------------------------------------------------------------------------------------

    def generator(self, reader: Reader) -> Callable[[Request], Any]:
        """Return the endpoint of one generation API."""

        async def endpoint(request: Request) -> Response:
            raw = await request.body()
            try:
                return await until_gone(request.receive, self._generate(request, raw, reader))
            except ClientGone:
                return Response(status_code=_CLIENT_GONE)

        return endpoint

    async def _generate(self, request: Request, raw: bytes, reader: Reader) -> Response:
        live = self._host.live
        note = _Note(
            path=request.url.path,
            request_id=request.headers.get("x-request-id") or secrets.token_hex(16),
            session_id=request.headers.get("x-session-id"),
            incarnation=live,
        )
        try:
            await _suffer(live)
            return await self._answer(note, raw, reader)
        except SchemaUnsatisfiable as error:
            return self._refuse(note, ApiError(str(error), param="tools"))
        except ApiError as error:
            return self._refuse(note, error)
        except asyncio.CancelledError:
            self._end(note, status=_CLIENT_GONE)
            raise

    async def _answer(self, note: _Note, raw: bytes, reader: Reader) -> Response:
        live = note.incarnation
        body = _json_object(raw)
        if note.session_id is None and isinstance(body.get("session_id"), str):
            note.session_id = body["session_id"]
        call = reader(body, served=_served(live), request_id=note.request_id, session_id=note.session_id)
        note.call = call
        note.run = run = live.begin(call.generation)
        if call.generation.stream:
            return EventStream(
                self._events(note, call, run),
                finish=lambda: self._end(note, status=200 if _done(run) else _CLIENT_GONE),
                drop_after=live.faults.take_drop(),
                drop=self._host.drop,
            )
        await run.complete()
        answer = dump_json(call.document(run, live.kv_answer(run)))
        self._end(note, status=200)
        return Response(answer, media_type="application/json")

    async def _events(self, note: _Note, call: Call, run: Run) -> AsyncGenerator[bytes, None]:
        try:
            async for event in call.events(run, lambda: note.incarnation.kv_answer(run)):
                yield event
        except ApiError as error:
            # The status line is long gone: vLLM, too, sends the error as an event.
            yield sse(error.body())
            yield DONE

    def _refuse(self, note: _Note, error: ApiError) -> Response:
        if error.reason:
            note.incarnation.metrics.refusals[error.reason] += 1
        self._end(note, status=error.status, error=error)
        return error_response(error)

    def _end(self, note: _Note, *, status: int, error: ApiError | None = None) -> None:
        """End the request in the engine and write its record."""
        run, generation = note.run, note.call.generation if note.call else None
        if run is not None:
            note.incarnation.end(run)
        sources = run.choices[0].stream.sources if run and run.choices[0].stream else None
        self._host.record(
            RequestRecord(
                path=note.path,
                request_id=note.request_id,
                session_id=note.session_id,
                status=status,
                stream=bool(generation and generation.stream),
                kv=_kv_label(generation.kv.pull is not None, generation.kv.hold) if generation else "none",
                prompt_tokens=len(generation.prompt) if generation else 0,
                completion_tokens=run.completion_tokens if run else 0,
                cached_tokens=sources.local_cache_hit if sources else 0,
                external_tokens=sources.external_kv_transfer if sources else 0,
                refusal=error.reason if error else "",
                error=error.message if error else "",
                incarnation=note.incarnation.nixl_engine_id,
            )
        )

    # ---- the rest of vLLM's surface ------------------------------------------------------------------------

    async def models(self, _request: Request) -> Response:
        live = await self._open()
        card = {
            "id": live.config.model,
            "object": "model",
            "created": int(live.started_at_s),
            "owned_by": "conserve-emulator",
            "root": live.config.model,
            "parent": None,
            "max_model_len": live.config.max_model_len,
            "permission": [],
        }
        return JSONResponse({"object": "list", "data": [card]})

    async def tokenize(self, request: Request) -> Response:
        live = await self._open()
        body = _json_object(await request.body())
        check_model(body, _served(live))
        if "messages" in body:
            ids = chat_prompt(body, served=_served(live))
        elif isinstance(body.get("prompt"), str):
            ids = text_tokens(body["prompt"])
        else:
            raise ApiError("send either messages or a prompt", param="prompt")
        document = {"count": len(ids), "max_model_len": live.config.max_model_len, "tokens": list(ids)}
        return JSONResponse({**document, "token_strs": None})

    async def detokenize(self, request: Request) -> Response:
        await self._open()
        tokens = _json_object(await request.body()).get("tokens")
        try:
            return JSONResponse({"prompt": text_of(new_tokens(tokens or []))})
        except (TypeError, OverflowError) as error:
            raise ApiError("tokens must be a list of token ids", param="tokens") from error

    async def version(self, _request: Request) -> Response:
        await self._open()
        return JSONResponse({"version": VLLM_VERSION})

    async def health(self, _request: Request) -> Response:
        await self._open()
        return Response()

    async def load(self, _request: Request) -> Response:
        await self._open()
        return JSONResponse({"server_load": 0})

    async def metrics(self, _request: Request) -> Response:
        live = await self._open()
        live.refresh_ledger()
        page = metrics_page(
            MetricsSource(
                model=live.model,
                metrics=live.metrics,
                model_name=live.config.model,
                role=live.config.role,
                started_at_s=live.started_at_s,
            )
        )
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    # ---- the emulator's own --------------------------------------------------------------------------------

    async def state(self, _request: Request) -> Response:
        live = self._host.live
        sessions: dict[str, int] = {}
        for entry in self._host.records():
            if entry.session_id is not None:
                sessions[entry.session_id] = sessions.get(entry.session_id, 0) + 1
        return JSONResponse(
            {
                "id": live.config.id,
                "role": live.config.role,
                "nixl_engine_id": live.nixl_engine_id,
                "running": live.model.running,
                "waiting": live.model.waiting,
                "held": sorted(live.model.holds),
                "kv_usage_ppm": live.model.kv_usage_ppm,
                "sessions": sessions,
                "faults": live.faults.state(),
            }
        )

    async def requests(self, _request: Request) -> Response:
        return JSONResponse([asdict(entry) for entry in self._host.records()])

    async def faults(self, request: Request) -> Response:
        live = self._host.live
        if request.method == "GET":
            return JSONResponse(live.faults.state())
        try:
            order = FaultOrder.model_validate_json(await request.body() or b"{}")
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise ApiError(f"fault order: {where}: {problem['msg']}", param=where or None) from error
        await self._host.order(order.model_copy(update={"kill": False}))
        background = BackgroundTask(self._host.kill) if order.kill else None
        return JSONResponse(live.faults.state(), background=background)

    async def _open(self) -> Incarnation:
        live = self._host.live
        await live.faults.until_open()
        return live


async def _suffer(live: Incarnation) -> None:
    """Let a generation request meet the faults that are ordered."""
    await live.faults.until_open()
    await asyncio.sleep(live.faults.slow_ms / 1000)
    if status := live.faults.take_failure():
        raise ApiError("injected failure", status=status, kind="InternalServerError")


def _served(live: Incarnation) -> Served:
    return Served(
        model=live.config.model,
        max_model_len=live.config.max_model_len,
        image_tokens=live.config.image_tokens,
        connector=live.config.connector != "none",
        stream_interval=live.config.stream_interval,
    )


def _json_object(raw: bytes) -> Body:
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    return body


def _kv_label(pull: bool, hold: bool) -> str:
    return {(False, False): "none", (False, True): "hold", (True, False): "pull"}.get((pull, hold), "pull+hold")


def _done(run: Run) -> bool:
    return all(choice.finished for choice in run.choices)

"""`LeaseGuard`: the ASGI middleware in front of vLLM's API server."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from conserve_sdk.core.units import Incarnation, Ms
from conserve_vllm.find import form_may_hold_params, may_hold_params, parse
from conserve_vllm.http import (
    Caught,
    ClientGone,
    Receive,
    Scope,
    Send,
    header,
    noting,
    read_body,
    replay,
    respond,
    with_body,
)
from conserve_vllm.identity import api_servers, describe, kept_ms, knows_leases, process_incarnation, served_model
from conserve_vllm.judge import Judge, Verdict
from conserve_vllm.prompt import TRANSFER_KEY
from conserve_vllm.refusal import Refusal
from conserve_vllm.release import RELEASE_PATH, StatusOnly, release_body, release_scope
from conserve_vllm.settings import GuardConfigError, GuardSettings

__all__ = ["LeaseGuard"]

log = logging.getLogger("conserve_vllm.guard")

App = Callable[[Scope, Receive, Send], Awaitable[None]]

IDENTITY_PATH = "/conserve/engine"
BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS = frozenset({"/tokenize", "/detokenize", "/ping"})
"""Cost no GPU and are asked before there is a lease."""
_LEASE = b"x-conserve-lease"
"""Where the SDK puts the lease token; named here again, because the SDK's transport needs more than an engine has."""


def _unix_ms() -> Ms:
    return Ms(time.time_ns() // 1_000_000)


class LeaseGuard:
    """Lets only the holder of a lease on this engine steer its KV cache.

    Closed for whatever may carry `kv_transfer_params`, open for plain requests (unless leases are required). Answers
    are not touched, except that a prefill leg's params get a stamp.

    Args:
        app: what is guarded.
        settings: None reads `CONSERVE_GUARD_*`, as under vLLM; a mistake there ends the server as it starts.
        now_ms: Unix time (tests).
        incarnation: this life of the engine; None derives it from the process.
    """

    def __init__(
        self,
        app: App,
        settings: GuardSettings | None = None,
        *,
        now_ms: Callable[[], Ms] = _unix_ms,
        incarnation: Callable[[], Incarnation] | None = None,
    ) -> None:
        self._app = app
        self._state: object = None
        self._counts: Counter[str] = Counter()
        self._problem = ""
        try:
            self._settings = settings or GuardSettings.from_env()
        except GuardConfigError as error:
            self._problem = str(error)
            return
        fixed = Incarnation(self._settings.incarnation or process_incarnation())
        self._incarnation = incarnation or (lambda: fixed)
        self._judge = Judge(
            self._settings, incarnation=self._incarnation, now_ms=now_ms, kept_ms=lambda: kept_ms(self._state)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope."""
        self._state = getattr(scope.get("app"), "state", self._state)
        kind = scope["type"]
        if kind == "lifespan":
            await self._live(scope, receive, send)
        elif self._problem:
            await respond(send, status=500, body=Refusal(500, "guard_misconfigured", self._problem).body())
        elif kind == "http":
            await self._http(scope, receive, send)
        else:
            await self._other(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem
        if not problem and api_servers(self._state) > 1:
            problem = "each API server would remember used transfers for itself: start vLLM with --api-server-count 1"
        if not problem:
            await self._app(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.failed", "message": f"ConServe guard: {problem}"})

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A websocket: it carries no transfer params, but it may need a lease."""
        try:
            self._judge.admit(header(scope, _LEASE))
        except Refusal as refusal:
            self._note(refusal)
            await send({"type": "websocket.close", "code": 1008, "reason": refusal.code})
            return
        await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in BODILESS:
            if scope["path"] == IDENTITY_PATH:
                await respond(send, status=200, body=self._identity())
            else:
                await self._app(scope, receive, send)
            return
        try:
            token = header(scope, _LEASE)
            if scope["path"] not in OPEN_PATHS:
                self._judge.admit(token)
            if scope["path"] == RELEASE_PATH:
                await self._release(scope, receive, send, token)
                return
            raw = await self._read(scope, receive)
            body, verdict = self._look(scope, raw, token)
        except Refusal as refusal:
            self._note(refusal)
            await respond(send, status=refusal.status, body=refusal.body())
            return
        except ClientGone:
            return
        self._counts[verdict.kind] += 1
        if body is not raw:
            scope = with_body(scope, body)
        await self._app(scope, replay(body, receive), self._answering(verdict, send))

    async def _release(self, scope: Scope, receive: Receive, send: Send, token: str | None) -> None:
        """End the hold of a lease."""
        lease_id = self._judge.holder(token)
        if not knows_leases(self._state):
            raise Refusal(
                409, "holds_not_leased", "this engine's holds end by themselves: start it with --leased-holds"
            )
        await read_body(scope, receive, bytes_max=self._settings.body_bytes_max)
        body = release_body(lease_id, model=served_model(self._state))
        answer = StatusOnly()
        await self._app(release_scope(scope, body), replay(body, receive), answer)
        if answer.status != HTTPStatus.OK:
            raise Refusal(502, "release_failed", f"the engine answered {answer.status}; the hold ends by itself")
        self._counts["released"] += 1
        await respond(send, status=HTTPStatus.NO_CONTENT, body=b"")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        coding = header(scope, b"content-encoding")
        if coding is not None and coding.strip().lower() not in ("", "identity"):
            raise Refusal(415, "content_encoding", f"send the body as it is, not {coding[:32]!r}-encoded")
        return await read_body(scope, receive, bytes_max=self._settings.body_bytes_max)

    def _look(self, scope: Scope, raw: bytes, token: str | None) -> tuple[bytes, Verdict]:
        """What to send on, and why."""
        content_type = header(scope, b"content-type") or ""
        if not may_hold_params(raw) and not form_may_hold_params(raw, content_type):
            return raw, Verdict(kind="plain")
        body = parse(raw, content_type)
        if body is None:
            return raw, Verdict(kind="plain")
        verdict = Verdict(kind="plain")
        if TRANSFER_KEY in body:
            verdict = self._judge.decide(scope["path"], body, token)
            if verdict.params is None:
                del body[TRANSFER_KEY]
            else:
                body[TRANSFER_KEY] = verdict.params
        # ASCII only: a lone surrogate survives the round trip as an escape and cannot be encoded otherwise.
        return json.dumps(body, separators=(",", ":")).encode("ascii"), verdict

    def _answering(self, verdict: Verdict, send: Send) -> Send:
        order = verdict.prefill
        if order is not None:
            return Caught(
                send, lambda answer: self._judge.stamp(answer, order), bytes_max=self._settings.body_bytes_max
            )
        if verdict.stripped:
            self._counts[f"stripped.{verdict.stripped}"] += 1
            return noting(send, f"hold-stripped; reason={verdict.stripped}")
        return send

    def _identity(self) -> bytes:
        facts: dict[str, Any] = describe(self._state, self._settings, incarnation=self._incarnation())
        return json.dumps(facts | {"guard": dict(self._counts)}).encode("ascii")

    def _note(self, refusal: Refusal) -> None:
        self._counts[f"refused.{refusal.code}"] += 1
        log.warning("request_refused code=%s detail=%s", refusal.code, refusal.message)

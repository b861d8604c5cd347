"""An engine made of written lines: replies in order, every call on record."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

import httpx2

from conserve_sdk._bodies import kind_of
from conserve_sdk._kind import Kind
from conserve_sdk.testing._clock import FakeClock
from conserve_sdk.testing._replies import EngineReply

__all__ = ["EngineCall", "Script", "ScriptedEngine", "UnexpectedCall"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCall:
    """One request an engine got.

    Attributes:
        engine: host of the URL up to its first dot (`d0` for `http://d0.invalid`).
        body: the JSON object that was sent, empty when there was none.
    """

    engine: str
    method: str
    path: str
    headers: httpx2.Headers
    content: bytes
    body: dict[str, Any]
    timeout: dict[str, float | None]

    @property
    def is_prefill(self) -> bool:
        """Whether it asks for a prompt's KV only, as the first of a first turn's two requests does."""
        params = self.body.get("kv_transfer_params") or {}
        one_token = 1 in (self.body.get("max_tokens"), self.body.get("max_output_tokens"))
        return bool(params.get("do_remote_decode") and not params.get("do_remote_prefill") and one_token)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The chat messages that were sent, the newest last."""
        return list(self.body.get("messages") or ())

    @property
    def tool_names(self) -> list[str]:
        """The tools that were offered to the model."""
        return [str(tool.get("function", tool).get("name")) for tool in self.body.get("tools") or ()]


Script: TypeAlias = EngineReply | Callable[[EngineCall], EngineReply]
"""A reply, or what makes one out of the call."""


class UnexpectedCall(AssertionError):  # noqa: N818 -- says what happened
    """An engine was asked for more than the script holds."""


class ScriptedEngine(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """Plays all engines of a fleet: hand it over as `engine_transport`. Thread-safe.

    Args:
        replies: played in order, whichever engine is called.
        then: what follows them: `"fail"` raises `UnexpectedCall` (an AssertionError); `"answer"` answers like vLLM
            (transfer params to a prefill, a completion or stream to all else).
        prefills: `"script"` plays the replies to prefill requests too; `"answer"` answers those like vLLM, so that the
            script holds the model's turns only, wherever the broker lets them be prefilled.
        clock: advanced by replies that take time (`EngineReply.taking`).

    Attributes:
        calls: every request, in the order of arrival.
    """

    def __init__(
        self,
        *replies: Script,
        then: Literal["fail", "answer"] = "fail",
        prefills: Literal["script", "answer"] = "script",
        clock: FakeClock | None = None,
    ) -> None:
        self.calls: list[EngineCall] = []
        self._any: deque[Script] = deque(replies)
        self._by_engine: dict[str, deque[Script]] = {}
        self._unexpected: list[str] = []
        self._then = then
        self._prefills = prefills
        self._clock = clock
        self._lock = threading.Lock()

    def script(self, engine: str, *replies: Script) -> Self:
        """Add replies that only this engine plays; they go before the common ones."""
        with self._lock:
            self._by_engine.setdefault(engine, deque()).extend(replies)
        return self

    def add(self, *replies: Script) -> Self:
        """Add replies behind the common ones."""
        with self._lock:
            self._any.extend(replies)
        return self

    def calls_to(self, engine: str) -> list[EngineCall]:
        """The requests that one engine got."""
        return [call for call in self.calls if call.engine == engine]

    @property
    def turns(self) -> list[EngineCall]:
        """The requests that were to be answered: all but prefills and those that are no completions."""
        return [call for call in self.calls if kind_of(call.method, call.path) and not call.is_prefill]

    def assert_complete(self) -> None:
        """Every scripted reply was played, and no other was asked for.

        Raises:
            AssertionError: some were not, or an agent swallowed an `UnexpectedCall`.
        """
        assert not self._unexpected, f"nobody scripted a reply for: {'; '.join(self._unexpected)}"
        left = len(self._any) + sum(map(len, self._by_engine.values()))
        assert not left, f"{left} scripted replies were never asked for; calls: {[c.engine for c in self.calls]}"

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Play the next reply to a blocking client."""
        return self._play(request, request.read())

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Play the next reply to an async client."""
        return self._play(request, await request.aread())

    def close(self) -> None:
        """Nothing to close."""

    async def aclose(self) -> None:
        """Nothing to close."""

    def _play(self, request: httpx2.Request, content: bytes) -> httpx2.Response:
        call = EngineCall(
            engine=request.url.host.split(".")[0],
            method=request.method,
            path=request.url.path,
            headers=request.headers,
            content=content,
            body=json.loads(content) if content else {},
            timeout=dict(request.extensions.get("timeout", {})),
        )
        reply = self._next(call)
        _pass(self._clock, reply.takes_ms)
        if reply.raises is not None:
            raise reply.raises
        headers = {"content-type": reply.content_type, **reply.headers}
        return httpx2.Response(reply.status, headers=headers, stream=_Chunks(reply, self._clock))

    def _next(self, call: EngineCall) -> EngineReply:
        script = self._take(call)
        if script is not None:
            return script if isinstance(script, EngineReply) else script(call)
        return _like_vllm(call)

    def _take(self, call: EngineCall) -> Script | None:
        """The next scripted reply; None: answer like vLLM."""
        with self._lock:
            self.calls.append(call)
            own = self._by_engine.get(call.engine)
            if own:
                return own.popleft()
            if self._prefills == "answer" and call.is_prefill:
                return None
            if self._any:
                return self._any.popleft()
            if self._then == "answer":
                return None
            self._unexpected.append(f"{call.method} {call.path} on {call.engine}")
        raise UnexpectedCall(f"no reply scripted for {self._unexpected[-1]}")


class _Chunks(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    def __init__(self, reply: EngineReply, clock: FakeClock | None) -> None:
        self._reply = reply
        self._clock = clock

    def __iter__(self) -> Iterator[bytes]:
        for number, chunk in enumerate(self._reply.chunks):
            if number:
                _pass(self._clock, self._reply.between_ms)
            yield chunk
        if self._reply.drops is not None:
            raise self._reply.drops

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk


def _pass(clock: FakeClock | None, ms: int) -> None:
    if ms:
        assert clock is not None, "a reply that takes time needs ScriptedEngine(clock=...)"
        clock.advance(ms)


def _like_vllm(call: EngineCall) -> EngineReply:
    if call.is_prefill:
        return EngineReply.prefill()
    streams = bool(call.body.get("stream"))
    match kind_of(call.method, call.path):
        case Kind.RESPONSES:
            return EngineReply.response_stream("o", "k") if streams else EngineReply.response()
        case Kind.COMPLETIONS:
            return EngineReply.completion_stream("o", "k") if streams else EngineReply.completion()
        case _:
            return EngineReply.chat_stream("o", "k") if streams else EngineReply.chat()

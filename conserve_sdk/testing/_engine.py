"""An engine made of written lines: replies in order, every call on record."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import httpx2

__all__ = ["EngineCall", "EngineReply", "ScriptedEngine"]

_JSON = "application/json"
_EVENTS = "text/event-stream"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReply:
    """One reply; the class methods make the usual ones.

    Attributes:
        chunks: the body in the pieces in which it arrives.
        raises: raised instead of answering, as httpx2 would.
        drops: raised after the last chunk: the connection broke.
    """

    status: int = 200
    content_type: str = _JSON
    chunks: tuple[bytes, ...] = ()
    raises: Exception | None = None
    drops: Exception | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, data: object, *, status: int = 200) -> Self:
        """Any JSON document."""
        return cls(status=status, chunks=(json.dumps(data).encode(),))

    @classmethod
    def chat(
        cls,
        text: str = "ok",
        *,
        tool: str | None = None,
        prompt_tokens: int = 100,
        completion_tokens: int = 5,
        cached_tokens: int = 0,
    ) -> Self:
        """A chat completion: `text`, or a call of `tool`."""
        call = {"id": "call-1", "type": "function", "function": {"name": tool, "arguments": "{}"}}
        message = {"role": "assistant", "content": None if tool else text, **({"tool_calls": [call]} if tool else {})}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if tool else "stop"}
        usage = _usage(prompt_tokens, completion_tokens, cached_tokens)
        return cls.json({**_HEAD, "object": "chat.completion", "choices": [choice], "usage": usage})

    @classmethod
    def chat_stream(cls, *pieces: str, tool: str | None = None, usage: bool = True, end: bool = True) -> Self:
        """A streamed chat completion: one event per piece, then usage (if asked for) and the end marker."""
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({"content": p} for p in pieces)]
        if tool:
            deltas.append({"tool_calls": [{"index": 0, "id": "call-1", "function": {"name": tool, "arguments": "{}"}}]})
        events = [_chunk([{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
        if end:
            events.append(_chunk([{"index": 0, "delta": {}, "finish_reason": "tool_calls" if tool else "stop"}]))
            events += [_chunk([], usage=_usage(100, len(pieces), 0))] if usage else []
            events.append(b"data: [DONE]\n\n")
        return cls(content_type=_EVENTS, chunks=tuple(events))

    @classmethod
    def stream_error(cls, *, status: int = 500, message: str = "Internal server error") -> Self:
        """A stream that begins with an error, which is how vLLM reports one after its headers are out."""
        error = {"error": {"message": message, "type": "InternalServerError", "param": None, "code": status}}
        return cls(content_type=_EVENTS, chunks=(b"data: " + json.dumps(error).encode() + b"\n\n", b"data: [DONE]\n\n"))

    @classmethod
    def prefill(cls, *, params: object = ..., token_ids: Sequence[int] | None = (1, 2, 3), tokens: int = 100) -> Self:
        """A prefiller's answer; `params` replaces the transfer params (None: it has no KV connector)."""
        choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
        answer = {**_HEAD, "object": "chat.completion", "choices": [choice], "usage": _usage(tokens, 1, 0)}
        answer["kv_transfer_params"] = dict(TRANSFER_PARAMS) if params is ... else params
        answer["prompt_token_ids"] = None if token_ids is None else list(token_ids)
        return cls.json(answer)

    @classmethod
    def failure(cls, status: int, message: str = "no") -> Self:
        """An error answer in vLLM's shape."""
        return cls.json({"error": {"message": message, "type": "Error", "param": None, "code": status}}, status=status)

    @classmethod
    def unreachable(cls) -> Self:
        """Connection refused."""
        return cls(raises=httpx2.ConnectError("connection refused"))

    @classmethod
    def broken(cls) -> Self:
        """The connection is closed before any answer."""
        return cls(raises=httpx2.RemoteProtocolError("Server disconnected without sending a response."))

    @classmethod
    def silent(cls) -> Self:
        """No answer in time."""
        return cls(raises=httpx2.ReadTimeout("timed out"))

    def dropped(self) -> EngineReply:
        """This reply, broken off after its chunks."""
        return EngineReply(
            status=self.status,
            content_type=self.content_type,
            chunks=self.chunks,
            drops=httpx2.RemoteProtocolError("peer closed connection without sending complete message body"),
        )


TRANSFER_PARAMS: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2, 3, 4]],
    "remote_engine_id": "engine-p0",
    "remote_request_id": "chatcmpl-p0",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
}
"""What a prefiller gives back, after vLLM 0.32's NIXL connector."""


class ScriptedEngine(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """Plays all engines of a fleet: hand it over as `engine_transport`. Thread-safe.

    Args:
        replies: played in order, whichever engine is called.
        then: what follows them: `"fail"` raises AssertionError at an unexpected call; `"answer"` answers like vLLM
            (transfer params to a prefill, a completion or stream to all else).

    Attributes:
        calls: every request, in the order of arrival.
    """

    def __init__(self, *replies: EngineReply, then: Literal["fail", "answer"] = "fail") -> None:
        self.calls: list[EngineCall] = []
        self._any: deque[EngineReply] = deque(replies)
        self._by_engine: dict[str, deque[EngineReply]] = {}
        self._then = then
        self._lock = threading.Lock()

    def script(self, engine: str, *replies: EngineReply) -> Self:
        """Add replies that only this engine plays; they go before the common ones."""
        with self._lock:
            self._by_engine.setdefault(engine, deque()).extend(replies)
        return self

    def calls_to(self, engine: str) -> list[EngineCall]:
        """The requests that one engine got."""
        return [call for call in self.calls if call.engine == engine]

    def assert_complete(self) -> None:
        """Every scripted reply was played.

        Raises:
            AssertionError: some were not.
        """
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
        if reply.raises is not None:
            raise reply.raises
        headers = {"content-type": reply.content_type, **reply.headers}
        return httpx2.Response(reply.status, headers=headers, stream=_Chunks(reply))

    def _next(self, call: EngineCall) -> EngineReply:
        with self._lock:
            self.calls.append(call)
            for queue in (self._by_engine.get(call.engine), self._any):
                if queue:
                    return queue.popleft()
        assert self._then == "answer", f"no reply scripted for {call.method} {call.path} on {call.engine}"
        return _like_vllm(call.body)


class _Chunks(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    def __init__(self, reply: EngineReply) -> None:
        self._reply = reply

    def __iter__(self) -> Iterator[bytes]:
        yield from self._reply.chunks
        if self._reply.drops is not None:
            raise self._reply.drops

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk


_HEAD: dict[str, Any] = {"id": "chatcmpl-1", "created": 1, "model": "test-model"}


def _usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _chunk(choices: list[dict[str, Any]], *, usage: dict[str, Any] | None = None) -> bytes:
    data = {**_HEAD, "object": "chat.completion.chunk", "choices": choices, **({"usage": usage} if usage else {})}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _like_vllm(body: dict[str, Any]) -> EngineReply:
    params = body.get("kv_transfer_params") or {}
    if params.get("do_remote_decode") and not params.get("do_remote_prefill") and body.get("max_tokens") == 1:
        return EngineReply.prefill()
    return EngineReply.chat_stream("o", "k") if body.get("stream") else EngineReply.chat()

"""What a scripted engine says: vLLM's answers in the shapes of OpenAI's three APIs, and how they fail."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import httpx2

__all__ = ["TRANSFER_PARAMS", "EngineReply", "ToolCall"]

_JSON = "application/json"
_EVENTS = "text/event-stream"
_DONE = b"data: [DONE]\n\n"

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model asks for.

    Args:
        name: of the tool.
        arguments: the object it is called with, or any text where a model that writes bad JSON is to be played.
        id: by default `call-1`, `call-2`, ... in the order of the answer.
    """

    name: str
    arguments: Mapping[str, Any] | str = field(default_factory=dict)
    id: str = ""

    @property
    def arguments_text(self) -> str:
        """The arguments as the API carries them."""
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReply:
    """One reply; the class methods make the usual ones.

    Attributes:
        chunks: the body in the pieces in which it arrives.
        raises: raised instead of answering, as httpx2 would.
        drops: raised after the last chunk: the connection broke.
        takes_ms, between_ms: see `taking`.
    """

    status: int = 200
    content_type: str = _JSON
    chunks: tuple[bytes, ...] = ()
    raises: Exception | None = None
    drops: Exception | None = None
    headers: dict[str, str] = field(default_factory=dict)
    takes_ms: int = 0
    between_ms: int = 0

    @classmethod
    def json(cls, data: object, *, status: int = 200) -> Self:
        """Any JSON document."""
        return cls(status=status, chunks=(json.dumps(data).encode(),))

    # ---- answers ------------------------------------------------------------------------------------------------

    @classmethod
    def chat(
        cls,
        text: str = "ok",
        *,
        tool: str | None = None,
        tool_calls: Sequence[ToolCall] = (),
        prompt_tokens: int = 100,
        completion_tokens: int = 5,
        cached_tokens: int = 0,
    ) -> Self:
        """A chat completion: `text`, or calls of tools (`tool` is short for one without arguments)."""
        calls = _calls(tool, tool_calls)
        message: JsonObject = {"role": "assistant", "content": None if calls else text}
        if calls:
            message["tool_calls"] = [_chat_call(call) for call in calls]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
        usage = _usage(prompt_tokens, completion_tokens, cached_tokens)
        return cls.json({**_HEAD, "object": "chat.completion", "choices": [choice], "usage": usage})

    @classmethod
    def chat_stream(
        cls,
        *pieces: str,
        tool: str | None = None,
        tool_calls: Sequence[ToolCall] = (),
        usage: bool = True,
        end: bool = True,
        cached_tokens: int = 0,
    ) -> Self:
        """A streamed chat completion: one event per piece and tool call, then usage (if asked for) and the end."""
        calls = _calls(tool, tool_calls)
        deltas: list[JsonObject] = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces)]
        deltas += [{"tool_calls": [{"index": index, **_chat_call(call)}]} for index, call in enumerate(calls)]
        events = [_chunk([{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
        if end:
            events.append(_chunk([{"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop"}]))
            events += [_chunk([], usage=_usage(100, len(pieces), cached_tokens))] if usage else []
            events.append(_DONE)
        return cls(content_type=_EVENTS, chunks=tuple(events))

    @classmethod
    def completion(cls, text: str = "ok") -> Self:
        """An answer of the old completions API."""
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        answer = {**_HEAD, "id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": _usage(100, 5, 0)}
        return cls.json(answer)

    @classmethod
    def completion_stream(cls, *pieces: str) -> Self:
        """A streamed answer of the old completions API."""
        head = {**_HEAD, "id": "cmpl-1", "object": "text_completion"}
        ends = [*(None for _ in pieces[1:]), "stop"]
        texts = zip(pieces, ends, strict=True)
        events = [{**head, "choices": [{"index": 0, "text": text, "finish_reason": end}]} for text, end in texts]
        return cls(content_type=_EVENTS, chunks=(*map(_event, events), _DONE))

    @classmethod
    def response(cls, text: str = "ok", *, tool_calls: Sequence[ToolCall] = ()) -> Self:
        """An answer of the responses API."""
        return cls.json(_response(text, _calls(None, tool_calls)))

    @classmethod
    def response_stream(cls, *pieces: str) -> Self:
        """A streamed answer of the responses API."""
        whole = _response("".join(pieces), [])
        (message,), (part,) = whole["output"], whole["output"][0]["content"]
        place = {"item_id": message["id"], "output_index": 0, "content_index": 0}
        begun: JsonObject = {**whole, "status": "in_progress", "output": []}
        item: JsonObject = {**message, "status": "in_progress", "content": []}
        events: list[JsonObject] = [
            {"type": "response.created", "response": begun},
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {"type": "response.content_part.added", "part": {**part, "text": ""}, **place},
            *({"type": "response.output_text.delta", "delta": piece, "logprobs": [], **place} for piece in pieces),
            {"type": "response.output_text.done", "text": part["text"], "logprobs": [], **place},
            {"type": "response.content_part.done", "part": part, **place},
            {"type": "response.output_item.done", "output_index": 0, "item": message},
            {"type": "response.completed", "response": whole},
        ]
        lines = (_event({**event, "sequence_number": number}) for number, event in enumerate(events))
        return cls(content_type=_EVENTS, chunks=tuple(lines))

    @classmethod
    def prefill(cls, *, params: object = ..., token_ids: Sequence[int] | None = (1, 2, 3), tokens: int = 100) -> Self:
        """A prefiller's answer; `params` replaces the transfer params (None: it has no KV connector)."""
        choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
        answer = {**_HEAD, "object": "chat.completion", "choices": [choice], "usage": _usage(tokens, 1, 0)}
        answer["kv_transfer_params"] = dict(TRANSFER_PARAMS) if params is ... else params
        answer["prompt_token_ids"] = None if token_ids is None else list(token_ids)
        return cls.json(answer)

    # ---- failures -----------------------------------------------------------------------------------------------

    @classmethod
    def failure(cls, status: int, message: str = "no") -> Self:
        """An error answer in vLLM's shape."""
        return cls.json({"error": {"message": message, "type": "Error", "param": None, "code": status}}, status=status)

    @classmethod
    def stream_error(cls, *, status: int = 500, message: str = "Internal server error") -> Self:
        """A stream that begins with an error, which is how vLLM reports one after its headers are out."""
        error = {"error": {"message": message, "type": "InternalServerError", "param": None, "code": status}}
        return cls(content_type=_EVENTS, chunks=(_event(error), _DONE))

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

    def dropped(self, *, after: int | None = None) -> EngineReply:
        """This reply, broken off after so many of its chunks; after all of them by default."""
        error = httpx2.RemoteProtocolError("peer closed connection without sending complete message body")
        return replace(self, chunks=self.chunks[:after], drops=error)

    def taking(self, ms: int, *, between_ms: int = 0) -> EngineReply:
        """This reply, later: the engine's `clock` advances before it and between its chunks. Nothing sleeps."""
        return replace(self, takes_ms=ms, between_ms=between_ms)


TRANSFER_PARAMS: JsonObject = {
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

_HEAD: JsonObject = {"id": "chatcmpl-1", "created": 1, "model": "test-model"}


def _usage(prompt: int, completion: int, cached: int) -> JsonObject:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _calls(tool: str | None, tool_calls: Sequence[ToolCall]) -> list[ToolCall]:
    calls = [*([ToolCall(tool)] if tool else []), *tool_calls]
    return [replace(call, id=call.id or f"call-{number}") for number, call in enumerate(calls, 1)]


def _chat_call(call: ToolCall) -> JsonObject:
    function = {"name": call.name, "arguments": call.arguments_text}
    return {"id": call.id, "type": "function", "function": function}


def _response(text: str, calls: Sequence[ToolCall]) -> JsonObject:
    said = {"type": "output_text", "text": text, "annotations": []}
    message = {"type": "message", "id": "msg-1", "role": "assistant", "status": "completed", "content": [said]}
    asked = [
        {
            "type": "function_call",
            "id": f"fc-{call.id}",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments_text,
            "status": "completed",
        }
        for call in calls
    ]
    return {
        "id": "resp-1",
        "object": "response",
        "created_at": 1,
        "model": _HEAD["model"],
        "status": "completed",
        "output": asked or [message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 100,
            "output_tokens": 5,
            "total_tokens": 105,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }


def _chunk(choices: list[JsonObject], *, usage: JsonObject | None = None) -> bytes:
    return _event(
        {**_HEAD, "object": "chat.completion.chunk", "choices": choices, **({"usage": usage} if usage else {})}
    )


def _event(data: JsonObject) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"

"""Reads a response while it passes by: first token, gaps between tokens, usage, tool names, how it ended.

It is fed the bytes that the application gets and changes none of them. Pure: instants come from the caller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from conserve_sdk._kind import Kind
from conserve_sdk._stencil import Stencil, cut_stencil
from conserve_sdk.core._quick import quick_init
from conserve_sdk.telemetry import TBT_SAMPLES_MAX

__all__ = ["TurnFacts", "TurnTracker"]

_BODY_BYTES_MAX = 32_000_000
"""A non-streamed answer above this is passed on but not read."""
_EVENT_BYTES_MAX = 8_000_000
"""A single event above this ends the reading (not the stream)."""
_TOOL_NAMES_MAX = 64
_STENCILS_MAX = 8
"""Tries per stream to know its events by their bytes: one for the reasoning, one for the text, one for each call."""
_TOOL_ITEM_TYPES = frozenset({"function_call", "custom_tool_call", "mcp_call"})
_TOKEN_FIELDS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call")
_FINAL_EVENTS = frozenset({"response.completed", "response.incomplete", "response.failed"})


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFacts:
    """What a response said about its turn.

    Attributes:
        first_token_us: instant of the first token, None when none was seen.
        gaps_us: times between the events that carried tokens; empty unless streamed.
        prompt_tokens, completion_tokens, cached_tokens: `usage`; 0 when the engine gave none.
        says_cached: whether it said how many tokens were cached, so that a 0 means none.
        computed_tokens: prompt tokens that the engine says it computed and put into its cache, in whole blocks
            (vLLM 0.32, `PrefillStats.num_cache_creation_tokens`); 0 when it does not say.
        finish_reason: the engine's word (`stop`, `tool_calls`, `length`; `completed` and such for responses).
        tool_names: tools the model called, in order of appearance.
        response_id: the engine's id of the response.
        model: the engine's name of the model that answered.
        complete: whether the answer came whole (a stream: its end marker was seen).
        error: message of an error the engine put into the stream or body.
        error_status: its HTTP-like code, 0 without one.
    """

    first_token_us: int | None = None
    gaps_us: tuple[int, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    says_cached: bool = False
    computed_tokens: int = 0
    finish_reason: str = ""
    tool_names: tuple[str, ...] = ()
    response_id: str = ""
    model: str = ""
    complete: bool = False
    error: str = ""
    error_status: int = 0

    @property
    def calls_tools(self) -> bool:
        """Whether the turn asks for tools, so that the conversation's answer is still to come."""
        return bool(self.tool_names) or self.finish_reason in ("tool_calls", "function_call")


class TurnTracker:
    """Follows one response.

    Args:
        kind: the route that was called.
        streamed: whether the response is a stream of server-sent events.
    """

    def __init__(self, kind: Kind, *, streamed: bool) -> None:
        self._kind = kind
        self._streamed = streamed
        self._buffer = bytearray()
        self._deaf = False
        self._stencil: Stencil | None = None
        self._stencils_left = _STENCILS_MAX if streamed and kind is not Kind.RESPONSES else 0
        self._last_us: int | None = None
        self._first_us: int | None = None
        self._gaps: list[int] = []
        self._tools: list[str] = []
        self._usage: Mapping[str, Any] = {}
        self._finish = ""
        self._response_id = ""
        self._model = ""
        self._error = ""
        self._error_status = 0
        self._done = False

    @property
    def saw_end(self) -> bool:
        """Whether the stream's end marker has passed: what is left in the connection is framing."""
        return self._done

    @property
    def error_status(self) -> int:
        """Code of an error the engine put into the stream, 0 so far."""
        return self._error_status

    def feed(self, chunk: bytes, *, now_us: int) -> None:
        """Look at bytes that arrived at `now_us`."""
        if self._stencil is not None and not self._buffer and self._stencil.fits(chunk):
            self._token(now_us)
            return
        if self._deaf or not chunk:
            return
        if not self._streamed:
            if self._first_us is None:
                self._first_us = now_us
            self._buffer += chunk
            self._deaf = len(self._buffer) > _BODY_BYTES_MAX
            return
        whole = not self._buffer
        self._buffer += chunk
        payloads = self._events()
        events = [self._event(payload, now_us) for payload in payloads]
        if whole and self._stencils_left and len(events) == 1 and events[0] is not None and not self._buffer:
            self._cut_stencil(chunk, events[0])
        if len(self._buffer) > _EVENT_BYTES_MAX:
            self._deaf, self._stencil = True, None
            self._buffer.clear()

    def end(self) -> None:
        """The response's last byte has passed."""
        if self._streamed or self._deaf:
            return
        data = _json_object(bytes(self._buffer))
        self._buffer.clear()
        if data is None:
            return
        self._done = True
        self._read_error(data)
        self._read_whole(data)

    def facts(self) -> TurnFacts:
        """Everything seen so far."""
        found = self._usage.get("prompt_tokens_details") or self._usage.get("input_tokens_details")
        details: Mapping[str, Any] = found if isinstance(found, dict) else {}
        return TurnFacts(
            first_token_us=self._first_us if not self._error else None,
            gaps_us=tuple(self._gaps),
            prompt_tokens=_count(self._usage.get("prompt_tokens", self._usage.get("input_tokens"))),
            completion_tokens=_count(self._usage.get("completion_tokens", self._usage.get("output_tokens"))),
            cached_tokens=_count(details.get("cached_tokens")),
            says_cached=isinstance(details.get("cached_tokens"), int),
            # Chat says the one, responses the other, completions neither.
            computed_tokens=_count(details.get("created_cache_tokens", details.get("cache_write_tokens"))),
            finish_reason=self._finish,
            tool_names=tuple(self._tools),
            response_id=self._response_id,
            model=self._model,
            complete=self._done,
            error=self._error,
            error_status=self._error_status,
        )

    # ---- streams ----------------------------------------------------------------------------------------------

    def _events(self) -> list[bytes]:
        """Cut complete lines off the buffer; each `data:` line is one payload (vLLM writes one line per event)."""
        cut = self._buffer.rfind(b"\n") + 1
        if not cut:
            return []
        lines = bytes(self._buffer[:cut]).splitlines()
        del self._buffer[:cut]
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]

    def _event(self, payload: bytes, now_us: int) -> dict[str, Any] | None:
        """Read one event; returns it when there is a token in it."""
        if payload == b"[DONE]":
            self._done = True
            return None
        data = _json_object(payload)
        if data is None:
            return None
        self._read_error(data)
        has_token = self._read_response_event(data) if self._kind is Kind.RESPONSES else self._read_chunk(data)
        if not has_token:
            return None
        self._token(now_us)
        return data

    def _cut_stencil(self, chunk: bytes, data: dict[str, Any]) -> None:
        """Take the event for a model of those that follow, if a token is all that there is in it."""
        place = _sole_text(self._kind, data)
        if place is not None:
            self._stencils_left -= 1
            self._stencil = cut_stencil(chunk, *place, data) or self._stencil

    def _token(self, now_us: int) -> None:
        if self._last_us is None:
            self._first_us = now_us
        elif len(self._gaps) < TBT_SAMPLES_MAX:
            self._gaps.append(max(now_us - self._last_us, 0))
        self._last_us = now_us

    def _read_chunk(self, data: Mapping[str, Any]) -> bool:
        self._response_id = self._response_id or str(data.get("id") or "")
        self._model = self._model or str(data.get("model") or "")
        self._read_usage(data)
        has_token = False
        for choice in _objects(data.get("choices")):
            self._finish = str(choice.get("finish_reason") or self._finish)
            if self._kind is Kind.COMPLETIONS:
                has_token = has_token or bool(choice.get("text"))
                continue
            delta = choice.get("delta")
            if isinstance(delta, dict):
                has_token = has_token or any(delta.get(name) for name in _TOKEN_FIELDS)
                self._read_tools(delta)
        return has_token

    def _read_response_event(self, data: Mapping[str, Any]) -> bool:
        name = str(data.get("type") or "")
        if name in _FINAL_EVENTS:
            self._done = True
        response = data.get("response")
        if isinstance(response, dict):
            self._response_id = str(response.get("id") or self._response_id)
            self._model = str(response.get("model") or self._model)
            if name in _FINAL_EVENTS:
                self._read_whole(response)
        return name.endswith(".delta") and bool(data.get("delta"))

    # ---- both -------------------------------------------------------------------------------------------------

    def _read_whole(self, data: Mapping[str, Any]) -> None:
        self._response_id = str(data.get("id") or self._response_id)
        self._model = str(data.get("model") or self._model)
        self._read_usage(data)
        if self._kind is Kind.RESPONSES:
            self._finish = str(data.get("status") or self._finish)
            for item in _objects(data.get("output")):
                if item.get("type") in _TOOL_ITEM_TYPES:
                    self._add_tool(item.get("name"))
            return
        for choice in _objects(data.get("choices")):
            self._finish = str(choice.get("finish_reason") or self._finish)
            message = choice.get("message")
            if isinstance(message, dict):
                self._read_tools(message)

    def _read_tools(self, message: Mapping[str, Any]) -> None:
        for call in _objects(message.get("tool_calls")):
            function = call.get("function")
            self._add_tool(function.get("name") if isinstance(function, dict) else None)

    def _add_tool(self, name: object) -> None:
        if isinstance(name, str) and name and len(self._tools) < _TOOL_NAMES_MAX:
            self._tools.append(name)

    def _read_usage(self, data: Mapping[str, Any]) -> None:
        usage = data.get("usage")
        if isinstance(usage, dict):
            self._usage = usage

    def _read_error(self, data: Mapping[str, Any]) -> None:
        error = data.get("error")
        if isinstance(error, dict):
            self._error = str(error.get("message") or error.get("type") or "error")
            self._error_status = _count(error.get("code")) or 500


def _sole_text(kind: Kind, data: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    """Where the text of an event stands, if the event says nothing else that is kept."""
    choices = data.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    choice = choices[0]
    if choice.get("finish_reason") or isinstance(data.get("usage"), dict) or isinstance(data.get("error"), dict):
        return None
    if kind is Kind.COMPLETIONS:
        return (choice, "text") if _is_text(choice.get("text")) else None
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return None
    functions = [call.get("function") for call in _objects(delta.get("tool_calls"))]
    arguments = [function for function in functions if isinstance(function, dict)]
    if any(function.get("name") for function in arguments):
        return None
    places = [(delta, name) for name in _TOKEN_FIELDS if _is_text(delta.get(name))]
    places += [(function, "arguments") for function in arguments if _is_text(function.get("arguments"))]
    return places[0] if places else None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _json_object(payload: bytes) -> dict[str, Any] | None:
    try:
        data = from_json(payload)
    except ValueError:
        data = _slowly(payload)
    return data if isinstance(data, dict) else None


def _slowly(payload: bytes) -> object:
    """What the quick parser refuses and others read, such as half a surrogate pair."""
    try:
        return json.loads(payload)
    except ValueError:
        return None  # not ours to judge: the application gets the same bytes


def _objects(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0

"""`/v1/responses`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from conserve_lab.emulator.errors import ApiError
from conserve_lab.emulator.fields import Body, Served, check_model, kv_params, sampling, token_limit, whole
from conserve_lab.emulator.generation import Generation, KvAnswer, Run
from conserve_lab.emulator.http import sse
from conserve_lab.emulator.kv_params import read_kv_wish, take_prompt_token_ids
from conserve_lab.emulator.language import ANY_OBJECT, Delta, NamedTool, RenderedCall, assemble, render_chat
from conserve_lab.emulator.responses_input import messages_of_input


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesCall:
    """One responses request: what to generate and how to show it."""

    generation: Generation
    model: str
    served: Served
    created: int
    body: Body

    def document(self, run: Run, kv_answer: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the whole answer."""
        answer = run.choices[0].answer
        message = assemble(answer)
        output = [self.message_item(message.content)] if message.content or not message.calls else []
        output += [self.call_item(call) for call in message.calls]
        incomplete = answer.finish_reason == "length"
        return {
            **self._head("incomplete" if incomplete else "completed"),
            "output": output,
            "incomplete_details": {"reason": "max_output_tokens"} if incomplete else None,
            "usage": {
                "input_tokens": run.prompt_tokens,
                "input_tokens_details": {
                    "cache_write_tokens": run.created_cache_tokens,
                    "cached_tokens": run.cached_tokens,
                },
                "output_tokens": run.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": run.prompt_tokens + run.completion_tokens,
            },
            "kv_transfer_params": kv_answer,
        }

    async def events(self, run: Run, kv_answer: KvAnswer) -> AsyncIterator[bytes]:
        """Yield the answer's events; `response.completed` carries `kv_transfer_params`, as in vLLM."""
        writer = _EventWriter(self)
        head = self._head("in_progress") | {"output": []}
        yield writer.event("response.created", response=head)
        yield writer.event("response.in_progress", response=head)
        async for updates in run.updates(interval=self.served.stream_interval):
            for update in updates:
                for delta in update.choice.answer.deltas[update.start : update.end]:
                    for event in writer.show(delta):
                        yield event
        for event in writer.close():
            yield event
        final = self.document(run, kv_answer())
        kind = "response.completed" if final["status"] == "completed" else "response.incomplete"
        yield writer.event(kind, response=final)

    def _head(self, status: str) -> dict[str, Any]:
        return {
            "id": self.generation.request_id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": self.body.get("instructions"),
            "metadata": self.body.get("metadata"),
            "parallel_tool_calls": True,
            "temperature": self.body.get("temperature", 1.0),
            "top_p": self.body.get("top_p", 1.0),
            "tool_choice": self.body.get("tool_choice") or "auto",
            "tools": self.body.get("tools") or [],
            "usage": None,
        }

    def message_item(self, text: str, *, status: str = "completed") -> dict[str, Any]:
        """Return the output item of the answer's text."""
        part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
        return {
            "id": self.generation.request_id.replace("resp_", "msg_"),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [part] if status == "completed" else [],
        }

    def call_item(self, call: RenderedCall, *, status: str = "completed") -> dict[str, Any]:
        """Return the output item of a tool call."""
        return {
            "id": f"fc_{call.call_id}",
            "type": "function_call",
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
            "status": status,
        }


@dataclass(slots=True)
class _EventWriter:
    """Turns deltas into the Responses API's nested events."""

    call: ResponsesCall
    sequence: int = 0
    text: str = ""
    text_open: bool = False
    calls: list[RenderedCall] = field(default_factory=list)
    call_open: bool = False
    items_done: int = 0

    def event(self, kind: str, **fields: Any) -> bytes:
        number, self.sequence = self.sequence, self.sequence + 1
        return sse({"type": kind, "sequence_number": number, **fields}, event=kind)

    def show(self, delta: Delta | None) -> Iterator[bytes]:
        if delta is None:
            return
        if delta.content:
            if not self.text_open:
                yield from self._open_text()
            self.text += delta.content
            yield self._text_event("response.output_text.delta", delta=delta.content, logprobs=[])
        if delta.call_name:
            yield from self.close()
            self.calls.append(RenderedCall(delta.call_id, delta.call_name))
            self.call_open = True
            item = self.call.call_item(self.calls[-1], status="in_progress")
            yield self.event("response.output_item.added", output_index=self.items_done, item=item)
        elif delta.arguments:
            self.calls[-1].arguments += delta.arguments
            yield self._call_event("response.function_call_arguments.delta", delta=delta.arguments)

    def close(self) -> Iterator[bytes]:
        """End whichever item is open."""
        if self.text_open:
            self.text_open = False
            item = self.call.message_item(self.text)
            yield self._text_event("response.output_text.done", text=self.text, logprobs=[])
            yield self._text_event("response.content_part.done", part=item["content"][0])
            yield self.event("response.output_item.done", output_index=self.items_done, item=item)
            self.items_done += 1
        elif self.call_open:
            self.call_open = False
            last = self.calls[-1]
            yield self._call_event("response.function_call_arguments.done", arguments=last.arguments, name=last.name)
            item = self.call.call_item(last)
            yield self.event("response.output_item.done", output_index=self.items_done, item=item)
            self.items_done += 1

    def _open_text(self) -> Iterator[bytes]:
        self.text_open = True
        item = self.call.message_item("", status="in_progress")
        yield self.event("response.output_item.added", output_index=self.items_done, item=item)
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": None}
        yield self._text_event("response.content_part.added", part=part)

    def _text_event(self, kind: str, **fields: Any) -> bytes:
        item_id = self.call.message_item("")["id"]
        return self.event(kind, item_id=item_id, output_index=self.items_done, content_index=0, **fields)

    def _call_event(self, kind: str, **fields: Any) -> bytes:
        item_id = f"fc_{self.calls[-1].call_id}"
        return self.event(kind, item_id=item_id, output_index=self.items_done, **fields)


def read_responses(body: Body, *, served: Served, request_id: str, session_id: str | None) -> ResponsesCall:
    """Read a responses request.

    Raises:
        ApiError: It is not one that vLLM would accept.
    """
    model = check_model(body, served)
    previous = body.get("previous_response_id")
    if previous is not None:
        raise ApiError(
            f"Response with id {previous!r} not found; the engine stores no responses, send the whole input",
            status=404,
            kind="NotFoundError",
            param="previous_response_id",
        )
    params = kv_params(body, served)
    prompt = take_prompt_token_ids(params)
    if prompt is None:
        tools = body.get("tools") or []
        prompt = render_chat(messages_of_input(body), tools=[tool for tool in tools if _is_function(tool)])
    shared = sampling({**body, "n": None})
    whole(body, "max_output_tokens", default=1, least=1)
    limit = token_limit(body, ("max_output_tokens",), prompt_tokens=len(prompt), max_model_len=served.max_model_len)
    generation = Generation(
        request_id=f"resp_{request_id}",
        route="responses",
        prompt=prompt,
        wish=shared.wish(max_tokens=limit, tool_choice=_tool_choice(body), answer_schema=_answer_schema(body)),
        stream=bool(body.get("stream")),
        kv=read_kv_wish(params),
        cache_salt=str(body.get("cache_salt") or ""),
        session_id=session_id,
    )
    return ResponsesCall(generation=generation, model=model, served=served, created=int(time.time()), body=body)


def _is_function(tool: object) -> bool:
    return isinstance(tool, dict) and tool.get("type") == "function" and isinstance(tool.get("name"), str)


def _tool_choice(body: Body) -> str | NamedTool:
    choice = body.get("tool_choice")
    names = [tool["name"] for tool in body.get("tools") or [] if _is_function(tool)]
    if isinstance(choice, dict):
        if choice.get("name") not in names:
            raise ApiError("tool_choice names a tool that is not among the tools", param="tool_choice")
        return NamedTool(str(choice["name"]))
    if choice not in {None, "auto", "none", "required"}:
        raise ApiError("tool_choice must be auto, none, required or a named function", param="tool_choice")
    return str(choice or "auto") if names else "none"


def _answer_schema(body: Body) -> Mapping[str, Any] | None:
    text = body.get("text") or {}
    form = text.get("format") or {} if isinstance(text, dict) else {}
    if form.get("type") == "json_schema":
        if not isinstance(form.get("schema"), dict):
            raise ApiError("text.format.schema must be an object", param="text")
        return dict(form["schema"])
    return ANY_OBJECT if form.get("type") == "json_object" else None

"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from conserve_lab.emulator.errors import ApiError, invalid
from conserve_lab.emulator.fields import (
    Body,
    Served,
    check_model,
    check_stream_options,
    kv_params,
    sampling,
    text_of_content,
    token_limit,
    usage,
)
from conserve_lab.emulator.generation import Choice, Generation, KvAnswer, Run, Update
from conserve_lab.emulator.http import DONE, sse
from conserve_lab.emulator.kv_params import read_kv_wish, take_prompt_token_ids
from conserve_lab.emulator.language import (
    ANY_OBJECT,
    Call,
    ChatMessage,
    Delta,
    NamedTool,
    TokenIds,
    assemble,
    render_chat,
)
from conserve_lab.emulator.language.prompt import ROLES


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall:
    """One chat request: what to generate and how to show it."""

    generation: Generation
    model: str
    served: Served
    created: int
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool

    def document(self, run: Run, kv_answer: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the whole answer."""
        return {
            "id": self.generation.request_id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(choice) for choice in run.choices],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": usage(run.prompt_tokens, run.completion_tokens, run.cached_tokens, run.created_cache_tokens),
            "prompt_logprobs": None,
            "prompt_token_ids": list(self.generation.prompt) if self.return_token_ids else None,
            "kv_transfer_params": kv_answer,
        }

    async def events(self, run: Run, _kv_answer: KvAnswer) -> AsyncIterator[bytes]:
        """Yield the answer's chunks. `kv_transfer_params` never appear in them, as in vLLM."""
        first = {choice.index for choice in run.choices}
        async for updates in run.updates(interval=self.served.stream_interval):
            for update in updates:
                index = update.choice.index
                if index in first:
                    first.discard(index)
                    opening = self._chunk(index, {"role": "assistant", "content": ""})
                    if self.return_token_ids:
                        opening["prompt_token_ids"] = list(self.generation.prompt)
                    yield sse(opening)
                chunk = self._delta_chunk(run, update)
                # A token that shows nothing (half a character, a tool call's mark) makes no chunk, as in vLLM.
                if update.last or self.return_token_ids or chunk["choices"][0]["delta"]:
                    yield sse(chunk)
        if self.include_usage:
            end = self._chunk(0, {})
            end["choices"] = []
            end["usage"] = usage(run.prompt_tokens, run.completion_tokens, run.cached_tokens, run.created_cache_tokens)
            yield sse(end)
        yield DONE

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message = assemble(choice.answer)
        calls = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
        return {
            "index": choice.index,
            "message": {
                "role": "assistant",
                "content": message.content or (None if calls else ""),
                "refusal": None,
                "annotations": None,
                "tool_calls": calls or None,
                "reasoning": None,
            },
            "logprobs": None,
            "finish_reason": choice.answer.finish_reason,
            "stop_reason": choice.answer.stop_reason,
            "token_ids": list(choice.answer.token_ids) if self.return_token_ids else None,
        }

    def _delta_chunk(self, run: Run, update: Update) -> dict[str, Any]:
        answer = update.choice.answer
        chunk = self._chunk(update.choice.index, merged_delta(answer.deltas[update.start : update.end]))
        if update.last:
            chunk["choices"][0] |= {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
        if self.return_token_ids:
            chunk["choices"][0]["token_ids"] = list(answer.token_ids[update.start : update.end])
        if self.continuous_usage:
            chunk["usage"] = usage(
                run.prompt_tokens, run.completion_tokens, run.cached_tokens, run.created_cache_tokens
            )
        return chunk

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.generation.request_id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}],
        }


def read_chat(body: Body, *, served: Served, request_id: str, session_id: str | None) -> ChatCall:
    """Read a chat request.

    Raises:
        ApiError: It is not one that vLLM would accept.
    """
    model = check_model(body, served)
    options = check_stream_options(body)
    params = kv_params(body, served)
    prompt = take_prompt_token_ids(params)
    if prompt is None:
        prompt = chat_prompt(body, served=served)
    shared = sampling(body)
    limit = token_limit(
        body,
        ("max_completion_tokens", "max_tokens"),
        prompt_tokens=len(prompt),
        max_model_len=served.max_model_len,
    )
    schema, choices = answer_form(body)
    generation = Generation(
        request_id=f"chatcmpl-{request_id}",
        route="chat",
        prompt=prompt,
        wish=shared.wish(max_tokens=limit, tool_choice=_tool_choice(body), answer_schema=schema, choices=choices),
        n=shared.n,
        stream=bool(body.get("stream")),
        kv=read_kv_wish(params),
        cache_salt=str(body.get("cache_salt") or ""),
        session_id=session_id,
    )
    return ChatCall(
        generation=generation,
        model=model,
        served=served,
        created=int(time.time()),
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("continuous_usage_stats")),
        return_token_ids=bool(body.get("return_token_ids")),
    )


def chat_prompt(body: Body, *, served: Served) -> TokenIds:
    """Return the prompt tokens of a chat body (also for `/tokenize`).

    Raises:
        ApiError: Messages or tools are malformed.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages must be a non-empty list", param="messages")
    tools = body.get("tools") or []
    if not isinstance(tools, list) or any(not _is_tool(tool) for tool in tools):
        raise ApiError("tools must be a list of function tools with a name", param="tools")
    return render_chat(
        [_message(message, index, image_tokens=served.image_tokens) for index, message in enumerate(messages)],
        tools=tools,
        options=body.get("chat_template_kwargs") or None,
        add_generation_prompt=body.get("add_generation_prompt") is not False,
    )


def answer_form(body: Body) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """Return the schema and the choices an answer is bound to.

    Raises:
        ApiError: `response_format` or `structured_outputs` is malformed.
    """
    form = body.get("response_format") or {}
    outputs = body.get("structured_outputs") or {}
    if not isinstance(form, dict) or not isinstance(outputs, dict):
        raise ApiError("response_format and structured_outputs must be objects", param="response_format")
    if form.get("type") == "json_schema":
        schema = (form.get("json_schema") or {}).get("schema")
        if not isinstance(schema, dict):
            raise ApiError("response_format.json_schema.schema must be an object", param="response_format")
        return schema, ()
    if form.get("type") == "json_object" or outputs.get("json_object"):
        return ANY_OBJECT, ()
    if isinstance(outputs.get("json"), dict):
        return outputs["json"], ()
    return None, tuple(str(choice) for choice in outputs.get("choice") or ())


def merged_delta(deltas: tuple[Delta | None, ...]) -> dict[str, Any]:
    """Return one wire delta for the tokens of one chunk."""
    content = "".join(delta.content for delta in deltas if delta)
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if delta is None or delta.call_index is None:
            continue
        call = calls.setdefault(delta.call_index, {"index": delta.call_index, "function": {"arguments": ""}})
        if delta.call_name:
            call |= {"id": delta.call_id, "type": "function"}
            call["function"]["name"] = delta.call_name
        call["function"]["arguments"] += delta.arguments
    merged: dict[str, Any] = {"content": content} if content else {}
    if calls:
        merged["tool_calls"] = list(calls.values())
    return merged


def _message(message: object, index: int, *, image_tokens: int) -> ChatMessage:
    where = f"messages[{index}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ApiError(f"{where} needs a role, one of {', '.join(sorted(ROLES))}", param=where)
    calls: list[Call] = []
    for call in message.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(f"{where}.tool_calls need a function with a name", param=where)
        calls.append(Call(function["name"], str(function.get("arguments") or "{}")))
    text = text_of_content(message.get("content"), where=where, image_tokens=image_tokens)
    return ChatMessage(message["role"], text, tuple(calls))


def _is_tool(tool: object) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _tool_choice(body: Body) -> str | NamedTool:
    tools = body.get("tools") or []
    choice = body.get("tool_choice")
    if choice is None:
        return "auto" if tools else "none"
    if isinstance(choice, dict):
        name = (choice.get("function") or {}).get("name")
        if all(tool["function"]["name"] != name for tool in tools):
            raise ApiError(f"the tool {name!r} in tool_choice is not among the tools", param="tool_choice")
        return NamedTool(str(name))
    if choice not in {"auto", "none", "required"}:
        raise ApiError("tool_choice must be auto, none, required or a named function", param="tool_choice")
    if choice != "none" and not tools:
        raise ApiError(f"tool_choice {choice!r} needs tools", param="tool_choice")
    return str(choice)

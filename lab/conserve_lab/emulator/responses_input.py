"""The input of `/v1/responses` as chat messages."""

from __future__ import annotations

from typing import Any

from conserve_lab.emulator.errors import ApiError
from conserve_lab.emulator.fields import Body, text_of_content
from conserve_lab.emulator.language import Call, ChatMessage
from conserve_lab.emulator.language.prompt import ROLES


def messages_of_input(body: Body) -> list[ChatMessage]:
    """Return instructions and input items as messages.

    Raises:
        ApiError: The input is malformed.
    """
    messages: list[ChatMessage] = []
    if body.get("instructions"):
        messages.append(ChatMessage("system", str(body["instructions"])))
    items = body.get("input")
    if isinstance(items, str) and items:
        return [*messages, ChatMessage("user", items)]
    if not isinstance(items, list) or not items:
        raise ApiError("input must be a non-empty text or list of items", param="input")
    for index, item in enumerate(items):
        _append(messages, item, where=f"input[{index}]")
    return messages


def _append(messages: list[ChatMessage], item: Any, *, where: str) -> None:
    """Add one item; a function call joins the assistant message before it, as it was generated."""
    if not isinstance(item, dict):
        raise ApiError(f"{where} must be an object", param=where)
    kind = item.get("type", "message")
    if kind == "message" and item.get("role") in ROLES:
        messages.append(ChatMessage(item["role"], text_of_content(item.get("content"), where=where)))
    elif kind == "function_call":
        call = Call(str(item.get("name", "")), str(item.get("arguments") or "{}"))
        last = messages[-1] if messages else None
        if last is not None and last.role == "assistant":
            messages[-1] = ChatMessage(last.role, last.text, (*last.calls, call))
        else:
            messages.append(ChatMessage("assistant", "", (call,)))
    elif kind == "function_call_output":
        output = item.get("output")
        text = output if isinstance(output, str) else text_of_content(output, where=where)
        messages.append(ChatMessage("tool", text))
    elif kind != "reasoning":  # reasoning is dropped by chat templates
        raise ApiError(f"{where}: item of type {kind!r} is not supported", param=where)

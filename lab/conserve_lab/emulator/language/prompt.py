"""The chat template: messages to tokens and back.

Each message is a mark, its text tokenised on its own, and an end mark. So the tokens of a longer conversation extend
those of the shorter one, and an answer that comes back as a message has the very tokens it was generated with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from conserve_lab.emulator.language.tokens import (
    Mark,
    TokenIds,
    mark_id,
    new_tokens,
    split_marks,
    text_tokens,
)

_MARK_OF_ROLE = {
    "system": Mark.SYSTEM,
    "developer": Mark.SYSTEM,
    "user": Mark.USER,
    "assistant": Mark.ASSISTANT,
    "tool": Mark.TOOL,
    "function": Mark.TOOL,
}
_ROLE_OF_MARK = {
    Mark.SYSTEM: "system",
    Mark.USER: "user",
    Mark.ASSISTANT: "assistant",
    Mark.TOOL: "tool",
}
ROLES = frozenset(_MARK_OF_ROLE)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call inside an assistant message; arguments are JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message after the wire format's variety has been taken off."""

    role: str
    text: str
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What a prompt's tokens say."""

    tools: tuple[Tool, ...]
    messages: tuple[ChatMessage, ...]
    plain: str = ""
    """Text outside any message: the prompt of `/v1/completions`."""

    def last_user_index(self) -> int | None:
        """Return the index of the last user message, or None."""
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index].role == "user":
                return index
        return None


def canonical_arguments(arguments: str) -> str:
    """Return JSON arguments in the one spelling the template uses, as `tojson` in real templates does.

    Frameworks parse and re-dump arguments between turns; with one spelling the tokens stay the same.
    """
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False)
    except ValueError:
        return arguments


def call_tokens(call: Call) -> TokenIds:
    """Return the tokens of a tool call, both as generated and as rendered."""
    ids = new_tokens([mark_id(Mark.CALL)])
    ids.extend(text_tokens(call.name))
    ids.append(mark_id(Mark.ARGUMENTS))
    ids.extend(text_tokens(call.arguments))
    return ids


def render_chat(
    messages: Iterable[ChatMessage],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
) -> TokenIds:
    """Return the prompt tokens of a chat.

    Args:
        messages: The conversation.
        tools: Tool definitions as they came over the wire (they enter the prompt, as in real templates).
        options: `chat_template_kwargs`; they enter the prompt too.
        add_generation_prompt: Whether to end with the mark that opens the assistant's turn.
    """
    ids = new_tokens()
    if options:
        _append(ids, Mark.OPTIONS, json.dumps(options, sort_keys=True, ensure_ascii=False))
    if tools:
        _append(ids, Mark.TOOLS, json.dumps(list(tools), ensure_ascii=False))
    for message in messages:
        ids.append(mark_id(_MARK_OF_ROLE[message.role]))
        ids.extend(text_tokens(message.text))
        for call in message.calls:
            ids.extend(call_tokens(Call(call.name, canonical_arguments(call.arguments))))
        ids.append(mark_id(Mark.END))
    if add_generation_prompt:
        ids.append(mark_id(Mark.ASSISTANT))
    return ids


def parse_prompt(ids: TokenIds) -> Dialogue:
    """Return what prompt tokens say; tokens nobody rendered come back as plain text, never as an error."""
    tools: tuple[Tool, ...] = ()
    plain: list[str] = []
    messages: list[ChatMessage] = []
    name = ""
    for mark, text in split_marks(ids):
        role = _ROLE_OF_MARK.get(mark)  # type: ignore[call-overload]
        if role is not None:
            messages.append(ChatMessage(role, text))
        elif mark == Mark.TOOLS:
            tools = parse_tools(text)
        elif mark == Mark.CALL:
            name = text
        elif mark == Mark.ARGUMENTS and messages:
            last = messages[-1]
            messages[-1] = ChatMessage(last.role, last.text, (*last.calls, Call(name, text)))
        elif mark not in {Mark.END, Mark.OPTIONS, Mark.ARGUMENTS}:
            plain.append(text)
    opened = ids and ids[-1] == mark_id(Mark.ASSISTANT)
    return Dialogue(tools, tuple(messages[:-1] if opened else messages), "".join(plain))


@lru_cache(maxsize=256)
def parse_tools(text: str) -> tuple[Tool, ...]:
    """Return the tools of a tools section (chat or responses shape); unreadable ones are no tools."""
    try:
        entries = json.loads(text)
    except ValueError:
        return ()
    if not isinstance(entries, list):
        return ()
    found: list[Tool] = []
    for entry in entries:
        function = entry.get("function", entry) if isinstance(entry, dict) else {}
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            found.append(
                Tool(
                    function["name"],
                    str(function.get("description") or ""),
                    function.get("parameters") or {},
                )
            )
    return tuple(found)


def _append(ids: TokenIds, mark: Mark, text: str) -> None:
    ids.append(mark_id(mark))
    ids.extend(text_tokens(text))
    ids.append(mark_id(Mark.END))

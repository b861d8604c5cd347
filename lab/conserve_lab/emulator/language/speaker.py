"""The language: what the emulated model answers to a prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from conserve_lab.emulator.language.answer import Answer, cut, speak, stop_at
from conserve_lab.emulator.language.hints import Hints, hints_of
from conserve_lab.emulator.language.images import without_images
from conserve_lab.emulator.language.prompt import Call, Dialogue, Tool, parse_prompt
from conserve_lab.emulator.language.schema import fill_schema
from conserve_lab.emulator.language.tokens import TokenIds, digest

_SUBJECTS: Final = ("the file", "the table", "the first part", "the sum", "the plan", "the report", "each row")
_VERBS: Final = ("shows", "agrees with", "explains", "completes", "follows from", "supports", "contains")
_OBJECTS: Final = ("the request", "the numbers above", "what was asked", "the last step", "the data", "the goal")
ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}
"""What `response_format: json_object` binds an answer to."""
_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")
_SNIPPET_CHARS: Final = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageSettings:
    """How much the emulated model says; engines of one model share one setting.

    Raises:
        ValueError: A range is empty or negative.
    """

    tool_calls_min: int = 2
    tool_calls_max: int = 11
    """Tool calls after each user message, chosen by its text: 2 to 11 make conversations of 3 to 12 turns."""
    answer_tokens_min: int = 20
    answer_tokens_max: int = 60

    def __post_init__(self) -> None:
        for name in ("tool_calls", "answer_tokens"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if not 0 <= low <= high:
                raise ValueError(f"{name}_min..{name}_max must be a range of 0 or more, got {low}..{high}")


@dataclass(frozen=True, slots=True)
class NamedTool:
    """A `tool_choice` that names one function."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """The sampling fields that shape an answer. Temperature and its kin are ignored."""

    tool_choice: str | NamedTool = "auto"
    """`auto`, `none`, `required`, or the one tool to call."""
    answer_schema: Mapping[str, Any] | None = None
    """JSON schema of the answer (`response_format`)."""
    choices: Sequence[str] = ()
    """Allowed answers (`structured_outputs.choice`)."""
    max_tokens: int = 4096
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    include_stop: bool = False
    seed: int | None = None
    index: int = 0
    """Which of `n` answers this is."""
    tools: Sequence[Tool] = field(default=())
    """Used when the prompt carries no tools of its own."""


class Speaker:
    """Answers prompts.

    Args:
        settings: How much it says.
    """

    def __init__(self, settings: LanguageSettings) -> None:
        self._settings = settings

    def answer(self, prompt: TokenIds, wish: Wish) -> Answer:
        """Return the answer to a prompt: the same for the same tokens and wish, whichever engine asks.

        Raises:
            SchemaUnsatisfiable: A tool's parameters or the answer's schema cannot be satisfied.
        """
        dialogue = parse_prompt(prompt)
        seed = digest(prompt.tobytes(), _spelling(wish))
        answer = self._whole(dialogue, wish, seed)
        return cut(stop_at(answer, wish.stop, include=wish.include_stop), max_tokens=wish.max_tokens)

    def _whole(self, dialogue: Dialogue, wish: Wish, seed: int) -> Answer:
        tool = None if wish.ignore_eos else self._tool_to_call(dialogue, wish, seed)
        if tool is not None:
            call = self._call(tool, dialogue, seed)
            # vLLM ends a named call with "stop", any other with "tool_calls".
            reason = "stop" if isinstance(wish.tool_choice, NamedTool) else "tool_calls"
            return speak("", [call], call_id_prefix=f"call_{seed:016x}_", finish_reason=reason)
        if wish.choices:
            return speak(wish.choices[seed % len(wish.choices)], (), call_id_prefix="")
        if wish.answer_schema is not None:
            value = fill_schema(_named_keys(wish.answer_schema, dialogue), seed=seed, hints=_hints(dialogue))
            return speak(json.dumps(value, ensure_ascii=False), (), call_id_prefix="")
        return speak(self._text(dialogue, wish, seed), (), call_id_prefix="")

    # ---- tools ---------------------------------------------------------------------------------------------

    def _tool_to_call(self, dialogue: Dialogue, wish: Wish, seed: int) -> Tool | None:
        tools = dialogue.tools or tuple(wish.tools)
        if isinstance(wish.tool_choice, NamedTool):
            return next((tool for tool in tools if tool.name == wish.tool_choice.name), None)
        if not tools or wish.tool_choice == "none":
            return None
        calls_made = self._calls_made(dialogue)
        if wish.tool_choice != "required" and not self._wants_a_call(dialogue, calls_made):
            return None
        named = _named_tools(tools, _last_user_text(dialogue))
        if named:
            return named[calls_made % len(named)]
        return tools[seed % len(tools)]

    def _wants_a_call(self, dialogue: Dialogue, calls_made: int) -> bool:
        if not dialogue.messages or dialogue.messages[-1].role not in {"user", "tool"}:
            return False
        low, high = self._settings.tool_calls_min, self._settings.tool_calls_max
        return calls_made < low + digest("calls", _last_user_text(dialogue)) % (high - low + 1)

    def _calls_made(self, dialogue: Dialogue) -> int:
        """Return how many assistant messages with tool calls follow the last user message."""
        start = dialogue.last_user_index()
        return sum(1 for message in dialogue.messages[(start or 0) :] if message.calls)

    def _call(self, tool: Tool, dialogue: Dialogue, seed: int) -> Call:
        parameters = tool.parameters or {"type": "object", "properties": {}}
        value = fill_schema(parameters, seed=seed, hints=_hints(dialogue))
        return Call(tool.name, json.dumps(value, ensure_ascii=False))

    # ---- words ---------------------------------------------------------------------------------------------

    def _text(self, dialogue: Dialogue, wish: Wish, seed: int) -> str:
        low, high = self._settings.answer_tokens_min, self._settings.answer_tokens_max
        wanted = max(low + seed % (high - low + 1), wish.min_tokens)
        if wish.ignore_eos:
            wanted = wish.max_tokens + 1
        opening = _opening(dialogue)
        text = opening
        number = 0
        while len(text) < 4 * wanted:
            text += _sentence(digest(seed, number))
            number += 1
        # One token is four bytes of ASCII, and the end mark is a token too.
        return text[: max(len(opening), 4 * (wanted - 1))].rstrip()


def _opening(dialogue: Dialogue) -> str:
    last = dialogue.messages[-1] if dialogue.messages else None
    if last is not None and last.role == "tool":
        return f"The last tool returned: {' '.join(without_images(last.text).split())[:_SNIPPET_CHARS]}. "
    return ""


def _sentence(seed: int) -> str:
    words = []
    for options in (_SUBJECTS, _VERBS, _OBJECTS):
        seed, index = divmod(seed, len(options))
        words.append(options[index])
    return " ".join(words).capitalize() + ". "


def _last_user_text(dialogue: Dialogue) -> str:
    index = dialogue.last_user_index()
    return dialogue.plain if index is None else dialogue.messages[index].text


def _named_keys(schema: Mapping[str, Any], dialogue: Dialogue) -> Mapping[str, Any]:
    """Return the schema; where it leaves the object open, with the keys that the prompt asks for."""
    if schema != ANY_OBJECT:
        return schema
    return {"type": "object", "properties": {key: {"type": "string"} for key in _hints(dialogue).keys or ("answer",)}}


def _hints(dialogue: Dialogue) -> Hints:
    return hints_of(_last_user_text(dialogue))


def _named_tools(tools: Sequence[Tool], text: str) -> list[Tool]:
    """Return the tools a text speaks of.

    Tools all of whose name's words occur come in the order of the text; without any, those that share a word come
    best match first.
    """
    words = [part.lower() for part in _PARTS.findall(text)]
    whole: list[tuple[int, int, Tool]] = []
    partial: list[tuple[int, int, Tool]] = []
    for position, tool in enumerate(tools):
        parts = {part.lower() for part in _PARTS.findall(tool.name)}
        shared = parts.intersection(words)
        if parts and shared == parts:
            whole.append((min(words.index(part) for part in parts), position, tool))
        elif shared:
            partial.append((-len(shared), position, tool))
    return [tool for _, _, tool in sorted(whole or partial, key=lambda item: item[:2])]


def _spelling(wish: Wish) -> str:
    """Return the part of a wish that changes what is said (limits only cut it short)."""
    choice = wish.tool_choice.name if isinstance(wish.tool_choice, NamedTool) else f"*{wish.tool_choice}"
    schema = json.dumps(wish.answer_schema, sort_keys=True) if wish.answer_schema is not None else ""
    return f"{choice}|{schema}|{'/'.join(wish.choices)}|{wish.seed}|{wish.index}"

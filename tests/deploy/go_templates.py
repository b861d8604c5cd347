"""As much of Helm's template language as the chart uses, so that it can be rendered where there is no Helm."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

_ACTION = re.compile(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\(|\)|\||,|:=|[^\s()|,]+')


@dataclass
class Block:
    """A piece of a template: text, a value, or a branch with its parts."""

    kind: str
    text: str = ""
    body: list[Block] = field(default_factory=list)
    other: list[Block] = field(default_factory=list)


class Chart:
    """Templates by file name, rendered with values.

    Args:
        files: their text; those that begin with `_` only define.
        release, namespace: as `helm install RELEASE --namespace NAMESPACE`.
        app_version: of Chart.yaml.
    """

    def __init__(
        self, files: Mapping[str, str], *, release: str = "demo", namespace: str = "agents", app_version: str = "1"
    ) -> None:
        self._defined: dict[str, list[Block]] = {}
        self._files = {name: self._parsed(text) for name, text in files.items()}
        self._top = {
            "Release": {"Name": release, "Namespace": namespace},
            "Chart": {"AppVersion": app_version},
        }

    def render(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Every file that is not one of definitions."""
        top = {**self._top, "Values": values}
        return {
            name: self._rendered(blocks, top, {"$": top})
            for name, blocks in self._files.items()
            if not name.startswith("_")
        }

    # ---- parsing ----

    def _parsed(self, text: str) -> list[Block]:
        pieces: list[tuple[str, str]] = []
        at, trim = 0, False
        for action in _ACTION.finditer(text):
            before = text[at : action.start()]
            before = before.lstrip() if trim else before
            pieces.append(("text", before.rstrip() if action[1] else before))
            pieces.append(("action", action[2]))
            at, trim = action.end(), bool(action[3])
        pieces.append(("text", text[at:].lstrip() if trim else text[at:]))
        blocks, rest, _ = self._blocks(pieces)
        assert not rest, f"an end too many before {rest[:1]}"
        return blocks

    def _blocks(self, pieces: list[tuple[str, str]]) -> tuple[list[Block], list[tuple[str, str]], str]:
        blocks: list[Block] = []
        while pieces:
            (kind, text), *pieces = pieces
            if kind == "text":
                blocks.append(Block("text", text))
                continue
            word, _, rest = text.partition(" ")
            if word in ("end", "else"):
                assert not rest, f"not needed here: {text}"
                return blocks, pieces, word
            if word in ("if", "with", "range", "define"):
                body, pieces, ended = self._blocks(pieces)
                other: list[Block] = []
                if ended == "else":
                    other, pieces, ended = self._blocks(pieces)
                assert ended == "end", f"no end of {text}"
                if word == "define":
                    self._defined[rest.strip('"')] = body
                else:
                    blocks.append(Block(word, rest, body, other))
            else:
                blocks.append(Block("value", text))
        return blocks, [], ""

    # ---- rendering ----

    def _rendered(self, blocks: list[Block], dot: Any, names: dict[str, Any]) -> str:
        return "".join(self._one(block, dot, names) for block in blocks)

    def _one(self, block: Block, dot: Any, names: dict[str, Any]) -> str:
        if block.kind == "text":
            return block.text
        if block.kind == "value":
            return _text(self._value(block.text, dot, names))
        if block.kind == "range":
            variables, _, source = block.text.partition(":=")
            index, item = (name.strip() for name in variables.split(","))
            items = self._value(source, dot, names)
            rounds = [{**names, index: number, item: each} for number, each in enumerate(items)]
            return "".join(self._rendered(block.body, each[item], each) for each in rounds)
        value = self._value(block.text, dot, names)
        if not value:
            return self._rendered(block.other, dot, names)
        return self._rendered(block.body, value if block.kind == "with" else dot, names)

    def _value(self, text: str, dot: Any, names: dict[str, Any]) -> Any:
        words = _WORD.findall(text)
        value, rest = self._pipeline(words, dot, names)
        assert not rest, f"not understood: {text}"
        return value

    def _pipeline(self, words: list[str], dot: Any, names: dict[str, Any]) -> tuple[Any, list[str]]:
        value, words = self._command(words, dot, names, [])
        while words and words[0] == "|":
            value, words = self._command(words[1:], dot, names, [value])
        return value, words

    def _command(self, words: list[str], dot: Any, names: dict[str, Any], last: list[Any]) -> tuple[Any, list[str]]:
        if words[0] not in FUNCTIONS and words[0] != "include":
            return self._operand(words, dot, names)
        name, words = words[0], words[1:]
        arguments: list[Any] = []
        while words and words[0] not in ("|", ")"):
            value, words = self._operand(words, dot, names)
            arguments.append(value)
        arguments += last
        if name == "include":
            template, given = arguments
            return self._rendered(self._defined[template], given, {"$": given}), words
        return FUNCTIONS[name](*arguments), words

    def _operand(self, words: list[str], dot: Any, names: dict[str, Any]) -> tuple[Any, list[str]]:
        word, *words = words
        if word == "(":
            value, words = self._pipeline(words, dot, names)
            assert words[0] == ")", f"no end of a bracket before {words}"
            return value, words[1:]
        if word.startswith('"'):
            return word[1:-1], words
        if word.isdigit():
            return int(word), words
        start, *path = word.split(".")
        value = names[start] if start.startswith("$") else dot
        assert start.startswith("$") or not start, f"no such function: {word}"
        for key in filter(None, path):
            assert isinstance(value, Mapping), f"{word}: nothing is called {key}"
            assert key in value, f"{word}: nothing is called {key}"
            value = value[key]
        return value, words


def _text(value: Any) -> str:
    return {True: "true", False: "false", None: ""}.get(value, str(value)) if not isinstance(value, int) else str(value)


def _nindent(spaces: int, text: str) -> str:
    return "".join(f"\n{' ' * spaces}{line}" if line else "\n" for line in text.split("\n"))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": lambda one, other: one and other,
    "default": lambda usual, given: given or usual,
    "eq": lambda one, other: one == other,
    "gt": lambda one, other: one > other,
    "int": int,
    "nindent": _nindent,
    "printf": lambda form, *values: form.replace("%v", "%s") % values,
    "quote": lambda value: '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"',
    "sha256sum": lambda text: hashlib.sha256(text.encode()).hexdigest(),
    "toYaml": lambda value: yaml.safe_dump(value, sort_keys=True).rstrip("\n"),
    "trimSuffix": lambda suffix, text: text.removesuffix(suffix),
    "trunc": lambda length, text: text[:length],
    "until": range,
}

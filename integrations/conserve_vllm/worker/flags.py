"""Reading and completing a `vllm serve` command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from conserve_vllm.worker.options import Clash

__all__ = ["VllmCommand", "is_vllm"]

_ENTRY_POINTS = ("vllm.entrypoints",)


def is_vllm(command: Sequence[str]) -> bool:
    """Whether the command starts vLLM's API server."""
    by_name = PurePath(command[0]).name == "vllm" and "serve" in command[1:2]
    return by_name or any(word.startswith(_ENTRY_POINTS) for word in command)


class VllmCommand:
    """A command line of vLLM, which takes `--a-b x`, `--a-b=x` and `--a_b x` alike.

    Args:
        command: program and arguments.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.argv = list(command)

    def value(self, flag: str) -> str | None:
        """What the command says for a flag; the last one wins, as in argparse."""
        found = None
        for at, word in enumerate(self.argv):
            name, equals, rest = word.partition("=")
            if _dashed(name) != flag:
                continue
            found = rest if equals else (self.argv[at + 1] if at + 1 < len(self.argv) else None)
        return found

    def has(self, flag: str) -> bool:
        """Whether the flag is there, with or without a value."""
        return any(_dashed(word.partition("=")[0]) == flag for word in self.argv)

    def values(self, flag: str) -> list[str]:
        """All values of a flag that may be given several times."""
        pairs = zip(self.argv, [*self.argv[1:], ""], strict=True)
        return [
            rest if equals else following
            for word, following in pairs
            for name, equals, rest in [word.partition("=")]
            if _dashed(name) == flag
        ]

    @property
    def model_path(self) -> str | None:
        """The model: positional after `serve`, or `--model`."""
        if given := self.value("--model"):
            return given
        after = self.argv[self.argv.index("serve") + 1 :] if "serve" in self.argv else []
        return after[0] if after and not after[0].startswith("-") else None

    def json_value(self, flag: str) -> dict[str, Any]:
        """A flag's value as a JSON object; {} if it is absent.

        Raises:
            Clash: it is no JSON object, or given in dotted parts.
        """
        if any(_dashed(word).startswith(f"{flag}.") for word in self.argv):
            raise Clash(f"{flag}.KEY is not understood here; give {flag} as one JSON object")
        text = self.value(flag)
        if text is None:
            return {}
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Clash(f"{flag} must be a JSON object, got {text[:80]!r}")
        return found

    def replace(self, flag: str, value: str) -> None:
        """Set a flag, in place of what was said before."""
        kept: list[str] = []
        skip = False
        for word in self.argv:
            if skip:
                skip = False
                continue
            name, equals, _ = word.partition("=")
            if _dashed(name) == flag:
                skip = not equals
                continue
            kept.append(word)
        self.argv = [*kept, flag, value]


def _dashed(name: str) -> str:
    return name.replace("_", "-") if name.startswith("--") else name

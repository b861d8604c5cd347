"""Configuration errors that name the key and the remedy, one line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

_SILENT = frozenset({"default_factory_not_called"})  # only says that another key of the table is wrong already


class ConfigProblem(Exception):  # noqa: N818  # a list of findings for a person, not a fault of the program
    """The configuration cannot be used.

    Attributes:
        problems: one line per problem; each names the key and what to do.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of what is known."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(names)}"


def explain(error: ValidationError, data: Mapping[str, Any], keys: Mapping[str, Sequence[str]]) -> ConfigProblem:
    """Turn pydantic's findings into lines for the person who wrote the file.

    Args:
        error: what pydantic found.
        data: the merged input, from which engines get their ids as names.
        keys: known keys by table, `""` for the tables themselves, `"token.keys"` for a nested one.
    """
    lines: list[str] = []
    for finding in error.errors(include_url=False):
        if finding["type"] in _SILENT:
            continue
        location = finding["loc"]
        if not location:  # the rules across tables: complete lines already
            lines += str(finding["ctx"]["error"]).splitlines() if "ctx" in finding else [finding["msg"]]
            continue
        table = ".".join(part for part in location[:-1] if isinstance(part, str))
        lines.append(f"{_spell(location, data)}: {_remedy(finding, table, keys)}")
    return ConfigProblem(lines)


def _spell(location: Sequence[int | str], data: Mapping[str, Any]) -> str:
    """`engine.d0.url` where the engine has an id, else `engine[1].url`."""
    spelled, here = "", data
    for part in location:
        try:
            here = here[part]  # type: ignore[index]  # walks dicts and lists alike
        except (KeyError, IndexError, TypeError):
            here = {}
        if isinstance(part, int):
            name = (here.get("id") or here.get("kid") or here.get("tenant")) if isinstance(here, dict) else None
            spelled += f".{name}" if isinstance(name, str) else f"[{part}]"
        else:
            spelled += f".{part}" if spelled else part
    return spelled


def _remedy(finding: Any, table: str, keys: Mapping[str, Sequence[str]]) -> str:
    context = finding.get("ctx", {})
    match finding["type"]:
        case "extra_forbidden":
            return f"unknown key; {_home_of(str(finding['loc'][-1]), table, keys)}"
        case "missing":
            return "is missing; add it"
        case "value_error":
            return str(context["error"])
        case "greater_than_equal":
            message = f"must be at least {context['ge']}"
        case "less_than_equal":
            message = f"must be at most {context['le']}"
        case _:
            message = f"{finding['msg'][:1].lower()}{finding['msg'][1:]}"
    return message if _may_be_secret(finding["loc"]) else f"{message} (got {finding['input']!r:.80})"


def _may_be_secret(location: Sequence[int | str]) -> bool:
    """What stands there may be a secret, even under a wrong key or with a wrong type."""
    return location[0] in {"token", "access", "keys"} or any("api_key" in str(part) for part in location)


def _home_of(key: str, table: str, keys: Mapping[str, Sequence[str]]) -> str:
    """Where an unknown key may have been meant to stand."""
    known = keys.get(table, ())
    homes = [f"[{name}]" for name, others in keys.items() if name and name != table and key in others]
    if homes and not get_close_matches(key, known, n=1, cutoff=0.8):
        return f"it belongs in {' or '.join(homes)}"
    return suggestion(key, known)

"""What openai's client can send as it is, because it is JSON already."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any

from pydantic import BaseModel

__all__ = ["moved"]

_LEAVES = frozenset({str, int, float, bool, type(None)})


def moved(params: dict[str, Any], method: object, *names: str) -> dict[str, Any]:
    """A call's parameters, with lists that are plain JSON moved to `extra_body`, which openai sends unread.

    What goes over the wire is the same, byte for byte: `extra_body` replaces values where they stand.

    Args:
        params: of the call.
        method: what will be called. Where tracing has put a function of its own in openai's place, nothing is moved,
            so that it sees the messages.
        names: of the lists.
    """
    extra = params.get("extra_body")
    if not _is_openais(method) or not (extra is None or isinstance(extra, Mapping)):
        return params
    found = {}
    for name in names:
        given = params.get(name)
        if type(given) is list:
            try:
                found[name] = [_element(each) for each in given]
            except (_NotPlainError, RecursionError):  # too deep for us, perhaps not for openai
                continue
    if not found:
        return params
    return params | dict.fromkeys(found, ()) | {"extra_body": found | dict(extra or {})}


class _NotPlainError(Exception):
    """A value that openai's own walk may change."""


def _element(value: object) -> object:
    """A message; one that is an answer of before, as openai gave it, is written as openai itself would."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True, mode="json", exclude=getattr(value, "__api_exclude__", None))
    return _copy(value)


def _copy(value: object) -> object:
    """A copy, since a retry must send what was asked for, whatever becomes of the caller's list meanwhile."""
    kind = type(value)
    if kind in _LEAVES:
        return value
    if kind is dict:
        return {_key(name): _copy(each) for name, each in value.items()}  # type: ignore[attr-defined]
    if kind is list:
        return [_copy(each) for each in value]  # type: ignore[attr-defined]
    raise _NotPlainError


def _key(name: object) -> object:
    if type(name) is str:
        return name
    raise _NotPlainError


def _is_openais(method: object) -> bool:
    # `wraps` copies a function's module but not its globals, and a proxy passes for a function with `isinstance`.
    return type(method) is FunctionType and str(method.__globals__.get("__name__")).startswith("openai.")

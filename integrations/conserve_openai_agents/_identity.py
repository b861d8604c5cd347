"""Whose turn is it? What the runner and the application say about the conversation of a model call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from agents import ModelSettings

from conserve_sdk.identity import HEADER_CONVERSATION, HEADER_PARENT, HEADER_SESSION, current_conversation

__all__ = ["NamedTurn", "name_turn"]

GENERATED_KEY_PREFIX = "agents-sdk:"
"""How the keys begin that the runner makes up for a session, a group or a single run."""

RUN_KEY_PREFIX = "agents-sdk:run:"
"""How the key of a run without session and group begins: nobody else can know it."""

_KEY = "prompt_cache_key"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTurn:
    """A model call and its conversation.

    Attributes:
        settings: what to send: the runner's generated key has become a header, everything else is as it was.
        conversation: of the call; None when nothing names one.
        owned: the conversation is that of this run alone.
    """

    settings: ModelSettings
    conversation: str | None
    owned: bool = False


def name_turn(settings: ModelSettings, *, host: str | None = None, parent: str | None = None) -> NamedTurn:
    """Find the conversation of a model call.

    The application's header wins, then the enclosing `with conserve_sdk.conversation(...)`, then the application's own
    `prompt_cache_key` (which is forwarded), then `host`, then the key that the runner generated.

    Args:
        settings: of the call, with the runner's key in `extra_args`.
        host: conversation on which a call rides that has none but its run's own.
        parent: conversation of the run around this one, which a conversation of its own then names as its parent.
    """
    arguments = dict(settings.extra_args or {})
    key = arguments.get(_KEY)
    generated = key if isinstance(key, str) and key.startswith(GENERATED_KEY_PREFIX) else None
    if generated is not None:
        del arguments[_KEY]
        settings = replace(settings, extra_args=arguments or None)
    explicit = _named_by(settings) if generated is None else _header(settings.extra_headers)
    if explicit or generated is None:
        return NamedTurn(settings=settings, conversation=explicit)
    is_run = generated.startswith(RUN_KEY_PREFIX)
    named = host if is_run and host is not None else generated
    family = {HEADER_PARENT: parent} if parent is not None and parent != named else {}
    headers = {**family, **(settings.extra_headers or {}), HEADER_CONVERSATION: named}
    return NamedTurn(
        settings=replace(settings, extra_headers=headers), conversation=named, owned=is_run and named == generated
    )


def _named_by(settings: ModelSettings) -> str | None:
    """The conversation that the application names, in the order in which the transport looks for it."""
    return _header(settings.extra_headers) or _text(settings.extra_args) or _text(settings.extra_body)


def _header(headers: Mapping[str, Any] | None) -> str | None:
    given = {name.lower(): str(value) for name, value in (headers or {}).items()}
    return given.get(HEADER_CONVERSATION.lower()) or current_conversation() or given.get(HEADER_SESSION.lower())


def _text(fields: object) -> str | None:
    value = fields.get(_KEY) if isinstance(fields, Mapping) else None
    return value if isinstance(value, str) and value else None

"""Whose turn is it? Pydantic AI writes the conversation into every message of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_ai.messages import ModelMessage
from pydantic_ai.settings import ModelSettings

from conserve_sdk.identity import HEADER_CONVERSATION, HEADER_PARENT, HEADER_SESSION, current_conversation

__all__ = ["name_conversation"]


def name_conversation(
    messages: Sequence[ModelMessage],
    settings: ModelSettings | None,
    defaults: ModelSettings | None,
    *,
    parent: str | None = None,
) -> tuple[ModelSettings | None, str | None]:
    """Name the conversation of a request in a header, unless the application has named it.

    The application's header wins, then the enclosing `with conserve_sdk.conversation(...)`, then the conversation of
    the agent's run.

    Args:
        messages: of the request; the last one carries the run's `conversation_id`.
        settings: of the request.
        defaults: of the model: a header of theirs would be lost if the request had headers and they were not copied.
        parent: conversation of the run around this one, which a conversation of its own then names as its parent.

    Returns:
        The settings to use, and the conversation; None where nothing names one.
    """
    headers = {**_headers(defaults), **_headers(settings)}
    given = {name.lower(): value for name, value in headers.items()}
    named = given.get(HEADER_CONVERSATION.lower()) or current_conversation() or given.get(HEADER_SESSION.lower())
    found = messages[-1].conversation_id if messages else None
    if named or not found:
        return settings, named
    named_settings = ModelSettings(**(settings or {}))
    family = {HEADER_PARENT: parent} if parent and parent != found and HEADER_PARENT.lower() not in given else {}
    named_settings["extra_headers"] = {**headers, **family, HEADER_CONVERSATION: found}
    return named_settings, found


def _headers(settings: ModelSettings | None) -> Mapping[str, Any]:
    return (settings or {}).get("extra_headers") or {}

"""Whose turn is it? What LangChain and LangGraph know about the conversation of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config

CONFIGURABLE_KEYS = ("conserve_conversation_id", "thread_id")
"""Keys of `config["configurable"]` that name a conversation, the most explicit first."""

METADATA_KEYS = ("conversation_id", "session_id", "thread_id")
"""Keys of `config["metadata"]` that do; LangSmith groups runs by the same three."""


def conversation_of(config: RunnableConfig | None) -> str | None:
    """Return the conversation that a call belongs to.

    The call's own `config` comes first, then the one of the graph node around it, which LangGraph keeps in a context
    variable. LangChain does not hand `configurable` down to a model that is invoked directly, so it is read here.
    """
    return _named_in(config) or _named_in(var_child_runnable_config.get())


def named_in_metadata(metadata: Mapping[str, Any] | None) -> str | None:
    """Return the conversation that a run's metadata names; LangGraph puts the thread there."""
    return _first(metadata, METADATA_KEYS)


def _named_in(config: RunnableConfig | None) -> str | None:
    if config is None:
        return None
    return _first(config.get("configurable"), CONFIGURABLE_KEYS) or named_in_metadata(config.get("metadata"))


def _first(values: Mapping[str, Any] | None, keys: tuple[str, ...]) -> str | None:
    for key in keys:
        if values and (value := values.get(key)):
            return str(value)
    return None

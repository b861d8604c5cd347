"""What a node is given: a prompt like any chat model gets, or the state of a graph with a list of messages in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.prompt_values import PromptValue


def messages_of_state(input_: object) -> LanguageModelInput | None:
    """Return the messages of a graph's state, or None when `input_` is an ordinary prompt.

    A state is a mapping with the key `messages` or an object with that attribute (dataclass, pydantic model).
    Prompt values have such an attribute too, yet are prompts.

    Raises:
        ValueError: the mapping has no `messages`.
    """
    if isinstance(input_, str | list | tuple | PromptValue):
        return None
    if isinstance(input_, Mapping):
        found: Any = input_.get("messages")
        if found is None:
            keys = ", ".join(sorted(map(str, input_))) or "none"
            raise ValueError(f"ConServeChat as a node reads the state's key 'messages'; this state has: {keys}")
        return list(found)
    found = getattr(input_, "messages", None)
    return None if found is None else list(found)

"""openai's clients with the resources of `conserve_sdk.completions` and `conserve_sdk.responses`.

They bear openai's names: its user agent says the name of the class, and tools that look at a client go by it. The
resources are imported when they are first used, as openai does it, because they are slow to import.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import openai

if TYPE_CHECKING:
    from conserve_sdk.completions import AsyncPlainChat, PlainChat
    from conserve_sdk.responses import AsyncPlainResponses, PlainResponses

__all__ = ["AsyncOpenAI", "OpenAI"]


class OpenAI(openai.OpenAI):
    """Copies made by `with_options` are of the same kind."""

    @cached_property
    def chat(self) -> PlainChat:
        """With `PlainCompletions`."""
        from conserve_sdk.completions import PlainChat

        return PlainChat(self)

    @cached_property
    def responses(self) -> PlainResponses:
        """`PlainResponses`."""
        from conserve_sdk.responses import PlainResponses

        return PlainResponses(self)


class AsyncOpenAI(openai.AsyncOpenAI):
    """The async twin of `OpenAI`."""

    @cached_property
    def chat(self) -> AsyncPlainChat:
        """With `AsyncPlainCompletions`."""
        from conserve_sdk.completions import AsyncPlainChat

        return AsyncPlainChat(self)

    @cached_property
    def responses(self) -> AsyncPlainResponses:
        """`AsyncPlainResponses`."""
        from conserve_sdk.responses import AsyncPlainResponses

        return AsyncPlainResponses(self)

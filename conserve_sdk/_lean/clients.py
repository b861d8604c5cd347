"""The clients.

They bear openai's names: its user agent says the name of the class, and tools that look at a client go by it. The
resources are imported when they are first used, as openai does it, because they are slow to import.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import openai

from conserve_sdk._lean.answers import read

if TYPE_CHECKING:
    from conserve_sdk._lean.chat import AsyncLeanChat, LeanChat
    from conserve_sdk._lean.responses import AsyncLeanResponses, LeanResponses

__all__ = ["AsyncOpenAI", "OpenAI", "make_lean"]

ClientT = TypeVar("ClientT", bound=openai.OpenAI | openai.AsyncOpenAI)


class OpenAI(openai.OpenAI):
    """Copies made by `with_options` are of the same kind."""

    @cached_property
    def chat(self) -> LeanChat:
        """With `LeanCompletions`."""
        from conserve_sdk._lean.chat import LeanChat

        return LeanChat(self)

    @cached_property
    def responses(self) -> LeanResponses:
        """`LeanResponses`."""
        from conserve_sdk._lean.responses import LeanResponses

        return LeanResponses(self)

    def _process_response_data(self, *, data: object, cast_to: Any, response: Any) -> Any:
        answer = read(data, cast_to)
        if answer is not None:
            return answer
        return super()._process_response_data(data=data, cast_to=cast_to, response=response)


class AsyncOpenAI(openai.AsyncOpenAI):
    """The async twin of `OpenAI`."""

    @cached_property
    def chat(self) -> AsyncLeanChat:
        """With `AsyncLeanCompletions`."""
        from conserve_sdk._lean.chat import AsyncLeanChat

        return AsyncLeanChat(self)

    @cached_property
    def responses(self) -> AsyncLeanResponses:
        """`AsyncLeanResponses`."""
        from conserve_sdk._lean.responses import AsyncLeanResponses

        return AsyncLeanResponses(self)

    def _process_response_data(self, *, data: object, cast_to: Any, response: Any) -> Any:
        answer = read(data, cast_to)
        if answer is not None:
            return answer
        return super()._process_response_data(data=data, cast_to=cast_to, response=response)


def make_lean(client: ClientT) -> ClientT:
    """Make a client that somebody else has made one of these, in place, and return it.

    A client of a class of its own (Azure's, say) is left as it is.
    """
    lean = {openai.OpenAI: OpenAI, openai.AsyncOpenAI: AsyncOpenAI}.get(type(client))
    if lean is not None:
        client.__class__ = lean  # with the settings that it has, read from wherever its maker reads them
        for name in ("chat", "responses"):
            client.__dict__.pop(name, None)  # made before, of openai's class
    return client

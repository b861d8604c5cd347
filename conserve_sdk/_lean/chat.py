"""openai's chat completions; plain messages and tools are sent as they are."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from openai.resources.chat import AsyncChat, AsyncCompletions, Chat, Completions

from conserve_sdk._lean.plain import moved

__all__ = ["AsyncLeanChat", "AsyncLeanCompletions", "LeanChat", "LeanCompletions"]


class LeanCompletions(Completions):
    """Parameters, answers and errors are openai's."""

    def create(self, **params: Any) -> Any:
        """See `openai.resources.chat.Completions.create`."""
        return super().create(**moved(params, Completions.create, "messages", "tools"))

    def parse(self, **params: Any) -> Any:
        """See `openai.resources.chat.Completions.parse`, which reads the tools itself."""
        return super().parse(**moved(params, Completions.parse, "messages"))


class AsyncLeanCompletions(AsyncCompletions):
    """The async twin of `LeanCompletions`."""

    async def create(self, **params: Any) -> Any:
        """See `openai.resources.chat.AsyncCompletions.create`."""
        return await super().create(**moved(params, AsyncCompletions.create, "messages", "tools"))

    async def parse(self, **params: Any) -> Any:
        """See `openai.resources.chat.AsyncCompletions.parse`, which reads the tools itself."""
        return await super().parse(**moved(params, AsyncCompletions.parse, "messages"))


class LeanChat(Chat):
    """`client.chat`."""

    @cached_property
    def completions(self) -> LeanCompletions:
        """The completions of this client."""
        return LeanCompletions(self._client)


class AsyncLeanChat(AsyncChat):
    """The async twin of `LeanChat`."""

    @cached_property
    def completions(self) -> AsyncLeanCompletions:
        """The completions of this client."""
        return AsyncLeanCompletions(self._client)

"""openai's Responses API; plain input and tools are sent as they are."""

from __future__ import annotations

from typing import Any

from openai.resources.responses import AsyncResponses, Responses

from conserve_sdk._lean.plain import moved

__all__ = ["AsyncLeanResponses", "LeanResponses"]


class LeanResponses(Responses):
    """Parameters, answers and errors are openai's."""

    def create(self, **params: Any) -> Any:
        """See `openai.resources.responses.Responses.create`."""
        return super().create(**moved(params, Responses.create, "input", "tools"))


class AsyncLeanResponses(AsyncResponses):
    """The async twin of `LeanResponses`."""

    async def create(self, **params: Any) -> Any:
        """See `openai.resources.responses.AsyncResponses.create`."""
        return await super().create(**moved(params, AsyncResponses.create, "input", "tools"))

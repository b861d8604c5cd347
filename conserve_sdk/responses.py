"""openai's Responses API, without its walk through input that is JSON already: see `conserve_sdk.completions`."""

from __future__ import annotations

from typing import Any

from openai.resources.responses import AsyncResponses, Responses

from conserve_sdk._plain import moved

__all__ = ["AsyncPlainResponses", "PlainResponses"]


class PlainResponses(Responses):
    """`client.responses`; parameters, answers and errors are openai's."""

    def create(self, **params: Any) -> Any:
        """See `openai.resources.responses.Responses.create`."""
        return super().create(**moved(params, Responses.create, "input", "tools"))


class AsyncPlainResponses(AsyncResponses):
    """The async twin of `PlainResponses`."""

    async def create(self, **params: Any) -> Any:
        """See `openai.resources.responses.AsyncResponses.create`."""
        return await super().create(**moved(params, AsyncResponses.create, "input", "tools"))

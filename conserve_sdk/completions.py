"""openai's chat completions, without its walk through messages that are JSON already.

openai's client goes through every message of a call with every type that a message could have, each turn from the
beginning. That takes most of a turn's CPU, grows with the conversation, and holds the event loop meanwhile (figures in
`docs/clients.md`). It is there for dates, files and objects in messages, and for fields that go by another name, of
which messages have none. So lists that are plain JSON are sent as they are; anything else goes openai's way.

The clients of `ConServe.openai_client` and `ConServeChat` use these. For a client of your own:

```python
completions = PlainCompletions(client)
completions.create(model="...", messages=[...])  # as client.chat.completions.create
```
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from openai.resources.chat import AsyncChat, AsyncCompletions, Chat, Completions

from conserve_sdk._plain import moved

__all__ = ["AsyncPlainChat", "AsyncPlainCompletions", "PlainChat", "PlainCompletions"]


class PlainCompletions(Completions):
    """`client.chat.completions`; parameters, answers and errors are openai's."""

    def create(self, **params: Any) -> Any:
        """See `openai.resources.chat.Completions.create`."""
        return super().create(**moved(params, Completions.create, "messages", "tools"))

    def parse(self, **params: Any) -> Any:
        """See `openai.resources.chat.Completions.parse`, which reads the tools itself."""
        return super().parse(**moved(params, Completions.parse, "messages"))


class AsyncPlainCompletions(AsyncCompletions):
    """The async twin of `PlainCompletions`."""

    async def create(self, **params: Any) -> Any:
        """See `openai.resources.chat.AsyncCompletions.create`."""
        return await super().create(**moved(params, AsyncCompletions.create, "messages", "tools"))

    async def parse(self, **params: Any) -> Any:
        """See `openai.resources.chat.AsyncCompletions.parse`, which reads the tools itself."""
        return await super().parse(**moved(params, AsyncCompletions.parse, "messages"))


class PlainChat(Chat):
    """`client.chat`."""

    @cached_property
    def completions(self) -> PlainCompletions:
        """The completions of this client."""
        return PlainCompletions(self._client)


class AsyncPlainChat(AsyncChat):
    """The async twin of `PlainChat`."""

    @cached_property
    def completions(self) -> AsyncPlainCompletions:
        """The completions of this client."""
        return AsyncPlainCompletions(self._client)

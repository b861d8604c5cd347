"""`ConServeMiddleware`: conversations by name for agents that keep a `ChatOpenAI` of their own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_openai.chat_models.base import BaseChatOpenAI
from langgraph.runtime import Runtime

from conserve_langgraph._identity import conversation_of
from conserve_langgraph.callbacks import note_turn
from conserve_sdk import ConServe, connect
from conserve_sdk.identity import HEADER_CONVERSATION, current_conversation, wire_id

__all__ = ["ConServeMiddleware"]


class ConServeMiddleware(AgentMiddleware[Any, Any, Any]):
    """Makes the thread of an agent the leased conversation of its model's turns, and idle when a run is over.

    The model is any `ChatOpenAI` whose HTTP clients are ConServe's; models without (a fallback to another service) are
    left alone. An interrupted run is parked, as with `ConServeChat`.

    Example:
        ```python
        conserve = connect("http://broker:7070")
        model = ChatOpenAI(
            model="qwen", base_url=conserve_sdk.BASE_URL, api_key="EMPTY", stream_usage=True,
            http_client=conserve.http_client(), http_async_client=conserve.async_http_client(),
        )
        agent = create_agent(model, tools, middleware=[ConServeMiddleware(conserve)])
        ```

    Args:
        conserve: the object whose HTTP clients the model has, or the broker's URL for the one that `connect` shares.
            Default: the one for `CONSERVE_BROKER_URL`.

    Raises:
        ConfigError: no broker is named.
    """

    def __init__(self, conserve: ConServe | str | Sequence[str] | None = None) -> None:
        super().__init__()
        self._conserve = conserve if isinstance(conserve, ConServe) else connect(conserve)

    def wrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], ModelResponse[Any]],
    ) -> ModelResponse[Any]:
        """Name the conversation in a header of the model's request."""
        return handler(self._named(request))

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        """Like `wrap_model_call`."""
        return await handler(self._named(request))

    def after_agent(self, state: Any, runtime: Runtime[Any]) -> None:
        """The agent has answered: nothing keeps its leases but their time. Does no I/O."""
        conversation = _conversation()
        if conversation is not None:
            self._conserve.idle(conversation)

    async def aafter_agent(self, state: Any, runtime: Runtime[Any]) -> None:
        """Like `after_agent`."""
        self.after_agent(state, runtime)

    def _named(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        model = request.model
        if not isinstance(model, BaseChatOpenAI) or not (model.http_client or model.http_async_client):
            return request
        conversation = _conversation()
        if conversation is None:
            return request
        note_turn(self._conserve, conversation, thread=conversation_of(None))
        headers = dict(request.model_settings.get("extra_headers") or {})
        named = any(name.lower() == HEADER_CONVERSATION.lower() for name in headers)
        if named or current_conversation() is not None:  # the transport sees the block, and its lineage, by itself
            return request
        headers[HEADER_CONVERSATION] = conversation
        return request.override(model_settings={**request.model_settings, "extra_headers": headers})


def _conversation() -> str | None:
    scoped = current_conversation()
    found = scoped or conversation_of(None)
    return wire_id(found) if found else None

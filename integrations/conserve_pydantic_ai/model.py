"""`ConServeModel`: Pydantic AI's OpenAI models on leased conversations."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Literal

from pydantic_ai import RunContext
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models import ModelRequestParameters, StreamedResponse
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.profiles import ModelProfileSpec
from pydantic_ai.providers.vllm import VLLMProvider
from pydantic_ai.settings import ModelSettings

from conserve_pydantic_ai._identity import name_conversation
from conserve_pydantic_ai._runs import current_run, run_scope
from conserve_sdk import ConServe, connect

__all__ = ["ConServeModel", "ConServeProvider"]


class ConServeProvider(VLLMProvider):
    """Provider for Pydantic AI's OpenAI models: vLLM, reached by lease.

    `ConServeModel` is made of it. By itself it serves where a model is made elsewhere; conversations are then found by
    content, unless `with conserve_sdk.conversation(...)` or a header names them.

    Args:
        broker_url: one broker or several; default `CONSERVE_BROKER_URL`.
        conserve: a `conserve_sdk.ConServe` of your own, instead of `broker_url`.
        broker_api_key: this program's key at the broker; default `CONSERVE_BROKER_API_KEY`.
    """

    def __init__(
        self,
        broker_url: str | Sequence[str] | None = None,
        *,
        conserve: ConServe | None = None,
        broker_api_key: str | None = None,
    ) -> None:
        self.conserve = conserve or connect(broker_url, broker_api_key=broker_api_key)
        super().__init__(openai_client=self.conserve.async_openai_client())


class ConServeModel(WrapperModel):
    """Model for `Agent(...)`: the run's `conversation_id` is the leased conversation.

    Pydantic AI gives every run a conversation, hands it on with `message_history`, and takes it from
    `agent.run(conversation_id=...)`. The header `X-ConServe-Conversation` in `extra_headers` and
    `with conserve_sdk.conversation(id)` win over it.

    When a run returns, its leases are left to their time; one that ends with deferred tools (an approval, work done
    elsewhere) is parked, so that no engine keeps its KV for a person.

    Args:
        model_name: name that the engines serve.
        broker_url: one broker or several; default `CONSERVE_BROKER_URL`.
        conserve: a `conserve_sdk.ConServe` of your own, instead of `broker_url`.
        broker_api_key: this program's key at the broker; default `CONSERVE_BROKER_API_KEY`.
        api: which API to speak to the engines.
        profile: what the model can do; default: Pydantic AI's own for vLLM.
        settings: defaults of every request.
    """

    def __init__(
        self,
        model_name: str,
        *,
        broker_url: str | Sequence[str] | None = None,
        conserve: ConServe | None = None,
        broker_api_key: str | None = None,
        api: Literal["chat", "responses"] = "chat",
        profile: ModelProfileSpec | None = None,
        settings: ModelSettings | None = None,
    ) -> None:
        provider = ConServeProvider(broker_url, conserve=conserve, broker_api_key=broker_api_key)
        self.conserve = provider.conserve
        kind = OpenAIResponsesModel if api == "responses" else OpenAIChatModel
        super().__init__(kind(model_name, provider=provider, profile=profile, settings=settings))

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        """Answer one turn; see `pydantic_ai.models.Model`."""
        settings = self._begin(messages, model_settings)
        answer = await super().request(messages, settings, model_request_parameters)
        _note(answer, model_request_parameters)
        return answer

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None = None,
    ) -> AsyncGenerator[StreamedResponse]:
        """Stream one turn; see `pydantic_ai.models.Model`. Leaving it ends the request at the engine."""
        settings = self._begin(messages, model_settings)
        async with super().request_stream(messages, settings, model_request_parameters, run_context) as stream:
            yield stream
            _note(stream.get(), model_request_parameters)

    def _run_scope(self) -> AbstractAsyncContextManager[None]:
        """What an agent run holds around its requests. A private hook of Pydantic AI, held by a test."""
        return _nested(run_scope(self.conserve), super()._run_scope())

    def _begin(self, messages: list[ModelMessage], settings: ModelSettings | None) -> ModelSettings | None:
        run = current_run()
        parent = run.conversation_around if run is not None else None
        named, conversation = name_conversation(messages, settings, self.settings, parent=parent)
        if run is not None:
            run.asks(conversation)
        return named


def _note(answer: ModelResponse, parameters: ModelRequestParameters) -> None:
    run = current_run()
    if run is not None:
        run.answered(answer, parameters)


@asynccontextmanager
async def _nested(*scopes: AbstractAsyncContextManager[None]) -> AsyncGenerator[None]:
    async with AsyncExitStack() as stack:
        for scope in scopes:
            await stack.enter_async_context(scope)
        yield

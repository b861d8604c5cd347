"""`ConServeModel`, `ConServeResponsesModel` and their provider: the Agents SDK on leased conversations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

from agents import (
    Model,
    ModelProvider,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
)
from openai.types.responses import ResponseCompletedEvent

from conserve_openai_agents._hooks import current_run_owner
from conserve_openai_agents._identity import NamedTurn, name_turn
from conserve_openai_agents._runs import Run, book_of
from conserve_sdk import ConServe, connect

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from agents import Tool
    from agents.agent_output import AgentOutputSchemaBase
    from agents.handoffs import Handoff
    from agents.items import ModelResponse, TResponseInputItem, TResponseStreamEvent

SIDE_CHARS_MAX = 1_024
"""A request of a nested run that is no longer than this rides on the conversation around it: see `_host`."""


class _Leased(Model):
    """What both models do around the turn that their base class makes."""

    conserve: ConServe

    def _supports_default_prompt_cache_key(self) -> bool:
        """Ask the runner for its key per session. A private hook of openai-agents, held by a test."""
        return True

    async def _cleanup_on_run_end(self, owner: object) -> None:
        """The run is over. A private hook of openai-agents, held by a test."""
        await super()._cleanup_on_run_end(owner)
        await book_of(self.conserve).end(owner, conserve=self.conserve)

    async def get_response(  # noqa: PLR0917 -- the framework's signature
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff[Any, Any]],
        *args: Any,
        **kwargs: Any,
    ) -> ModelResponse:
        """Answer one turn; see `agents.Model`."""
        run, named = self._begin(model_settings, has_tools=bool(tools or handoffs), prompt=(system_instructions, input))
        answer = await super().get_response(  # type: ignore[safe-super]  # the next class in line answers
            system_instructions, input, named.settings, tools, output_schema, handoffs, *args, **kwargs
        )
        if run is not None:
            run.answered(answer.output, tools)
        return answer

    async def stream_response(  # noqa: PLR0917 -- the framework's signature
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff[Any, Any]],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncIterator[TResponseStreamEvent]:
        """Stream one turn; see `agents.Model`. Closing the iterator ends the request at the engine."""
        run, named = self._begin(model_settings, has_tools=bool(tools or handoffs), prompt=(system_instructions, input))
        stream = super().stream_response(  # type: ignore[safe-super]  # the next class in line answers
            system_instructions, input, named.settings, tools, output_schema, handoffs, *args, **kwargs
        )
        async with aclosing(cast("AsyncGenerator[TResponseStreamEvent, None]", stream)) as events:
            async for event in events:
                if run is not None and isinstance(event, ResponseCompletedEvent):
                    run.answered(event.response.output, tools)
                yield event

    def _begin(
        self,
        settings: ModelSettings,
        *,
        has_tools: bool,
        prompt: tuple[str | None, str | list[TResponseInputItem]],
    ) -> tuple[Run | None, NamedTurn]:
        run = book_of(self.conserve).run_of(current_run_owner())
        parent = run.parent.main_conversation if run is not None and run.parent is not None else None
        named = name_turn(settings, host=None if has_tools else _host(run, prompt), parent=parent)
        if run is not None and named.conversation is not None:
            run.asks(named.conversation, owned=named.owned)
        return run, named


class ConServeModel(_Leased, OpenAIChatCompletionsModel):
    """Model for `Agent(model=...)`: the session of the run is the conversation.

    The runner knows the session, a model does not; but for models that ask for it, the runner passes a key that is
    stable per session (else per `RunConfig.group_id`, else per run), which becomes the conversation here. A
    conversation named by the header `X-ConServe-Conversation` in `ModelSettings.extra_headers`, by
    `with conserve_sdk.conversation(id)` or by your own `prompt_cache_key` wins.

    When a run returns, its conversation is left to its time; when it stops for an approval, it is parked; and the
    conversation of a run without session and group, which nobody can go on with, is released.

    Args:
        model: name that the engines serve.
        broker_url: one broker or several; default `CONSERVE_BROKER_URL`.
        conserve: a `conserve_sdk.ConServe` of your own, instead of `broker_url`.
        broker_api_key: this program's key at the broker; default `CONSERVE_BROKER_API_KEY`.
        options: for `agents.OpenAIChatCompletionsModel`.
    """

    def __init__(
        self,
        model: str,
        *,
        broker_url: str | Sequence[str] | None = None,
        conserve: ConServe | None = None,
        broker_api_key: str | None = None,
        **options: Any,
    ) -> None:
        self.conserve = conserve or connect(broker_url, broker_api_key=broker_api_key)
        super().__init__(model=model, openai_client=self.conserve.async_openai_client(), **options)


class ConServeResponsesModel(_Leased, OpenAIResponsesModel):
    """`ConServeModel` over the Responses API of the engines, for what only it carries (reasoning items).

    Args:
        model: name that the engines serve.
        broker_url: one broker or several; default `CONSERVE_BROKER_URL`.
        conserve: a `conserve_sdk.ConServe` of your own, instead of `broker_url`.
        broker_api_key: this program's key at the broker; default `CONSERVE_BROKER_API_KEY`.
    """

    def __init__(
        self,
        model: str,
        *,
        broker_url: str | Sequence[str] | None = None,
        conserve: ConServe | None = None,
        broker_api_key: str | None = None,
    ) -> None:
        self.conserve = conserve or connect(broker_url, broker_api_key=broker_api_key)
        super().__init__(model=model, openai_client=self.conserve.async_openai_client())


class ConServeModelProvider(ModelProvider):
    """Provider for `RunConfig(model_provider=...)`: every agent of the run uses ConServe.

    Args:
        broker_url: one broker or several; default `CONSERVE_BROKER_URL`.
        conserve: a `conserve_sdk.ConServe` of your own, instead of `broker_url`.
        broker_api_key: this program's key at the broker; default `CONSERVE_BROKER_API_KEY`.
        default_model: name for agents that name none.
        use_responses: speak the Responses API to the engines instead of chat completions.
    """

    def __init__(
        self,
        broker_url: str | Sequence[str] | None = None,
        *,
        conserve: ConServe | None = None,
        broker_api_key: str | None = None,
        default_model: str | None = None,
        use_responses: bool = False,
    ) -> None:
        self.conserve = conserve or connect(broker_url, broker_api_key=broker_api_key)
        self.default_model = default_model
        self.use_responses = use_responses
        self._models: dict[str, Model] = {}

    def get_model(self, model_name: str | None) -> Model:
        """Return the model of that name.

        Raises:
            ValueError: the agent names no model and there is no `default_model`.
        """
        name = model_name or self.default_model
        if name is None:
            raise ValueError(
                "the agent names no model: set Agent(model=...) or ConServeModelProvider(default_model=...)"
            )
        if name not in self._models:
            kind = ConServeResponsesModel if self.use_responses else ConServeModel
            self._models[name] = kind(name, conserve=self.conserve)
        return self._models[name]


def _host(run: Run | None, prompt: tuple[str | None, str | list[TResponseInputItem]]) -> str | None:
    """The conversation around a nested run whose request is tiny: a guardrail or a title needs no lease of its own.

    The transport then sends it to the decoder of that conversation without a lease.
    """
    if run is None or run.parent is None or run.conversations:
        return None
    chars = sum(len(part) if isinstance(part, str) else len(str(part)) for part in prompt if part)
    return run.parent.main_conversation if chars <= SIDE_CHARS_MAX else None

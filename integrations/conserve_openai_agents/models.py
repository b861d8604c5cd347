"""`ConServeModel` and its provider: the Agents SDK's chat-completions model on leased conversations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agents import Model, ModelProvider, ModelSettings, OpenAIChatCompletionsModel

from conserve_sdk import ConServe, connect
from conserve_sdk.identity import HEADER_CONVERSATION, current_conversation

if TYPE_CHECKING:
    from agents.items import ModelResponse, TResponseInputItem, TResponseStreamEvent

GENERATED_KEY_PREFIX = "agents-sdk:"
"""How the keys begin that the runner makes up for a session, a group or a single run."""


class ConServeModel(OpenAIChatCompletionsModel):
    """Model for `Agent(model=...)`: the session of the run is the conversation.

    The runner knows the session, a model does not; but for models that ask for it, the runner passes a key that is
    stable per session (else per `RunConfig.group_id`, else per run), which becomes the conversation here. A
    conversation named by the header `X-ConServe-Conversation` in `ModelSettings.extra_headers`, by
    `with conserve_sdk.conversation(id)` or by your own `prompt_cache_key` wins.

    Args:
        model: name that the engines serve.
        broker_url: one broker or several; default `CONSERVE_BROKER_URL`.
        conserve: a `conserve_sdk.ConServe` of your own, instead of `broker_url`.
    """

    def __init__(
        self,
        model: str,
        *,
        broker_url: str | Sequence[str] | None = None,
        conserve: ConServe | None = None,
        **options: Any,
    ) -> None:
        self.conserve = conserve or connect(broker_url)
        super().__init__(model=model, openai_client=self.conserve.async_openai_client(), **options)

    def _supports_default_prompt_cache_key(self) -> bool:
        """Ask the runner for its key per session. A private hook of openai-agents, held by a test."""
        return True

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        *args: Any,
        **kwargs: Any,
    ) -> ModelResponse:
        """Answer one turn; see `agents.Model`."""
        named = name_conversation(model_settings)
        return await super().get_response(system_instructions, input, named, *args, **kwargs)

    def stream_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncIterator[TResponseStreamEvent]:
        """Stream one turn; returns the base class's iterator itself, so that closing it closes the request."""
        named = name_conversation(model_settings)
        return super().stream_response(system_instructions, input, named, *args, **kwargs)


class ConServeModelProvider(ModelProvider):
    """Provider for `RunConfig(model_provider=...)`: every agent of the run uses ConServe.

    Args:
        broker_url: one broker or several; default `CONSERVE_BROKER_URL`.
        conserve: a `conserve_sdk.ConServe` of your own, instead of `broker_url`.
        default_model: name for agents that name none.
    """

    def __init__(
        self,
        broker_url: str | Sequence[str] | None = None,
        *,
        conserve: ConServe | None = None,
        default_model: str | None = None,
    ) -> None:
        self.conserve = conserve or connect(broker_url)
        self.default_model = default_model
        self._models: dict[str, ConServeModel] = {}

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
            self._models[name] = ConServeModel(name, conserve=self.conserve)
        return self._models[name]


def name_conversation(settings: ModelSettings) -> ModelSettings:
    """Turn the runner's generated key into the conversation header; a key of the user's own stays where it is."""
    arguments = dict(settings.extra_args or {})
    key = arguments.get("prompt_cache_key")
    if not isinstance(key, str) or not key.startswith(GENERATED_KEY_PREFIX):
        return settings
    del arguments["prompt_cache_key"]
    headers = dict(settings.extra_headers or {})
    named = any(header.lower() == HEADER_CONVERSATION.lower() for header in headers)
    if not named and current_conversation() is None:
        headers[HEADER_CONVERSATION] = key
    return replace(settings, extra_args=arguments or None, extra_headers=headers or None)

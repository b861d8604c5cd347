"""`ConServeChat`: a LangChain chat model and LangGraph node whose conversations run on leases."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any, Self

from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langchain_openai.chat_models.base import BaseChatOpenAI
from pydantic import Field, SecretStr, model_validator

from conserve_langgraph._identity import conversation_of
from conserve_langgraph._state import messages_of_state
from conserve_langgraph._wiring import clients_of
from conserve_langgraph.callbacks import note_turn
from conserve_sdk import BASE_URL, ConfigError, ConServe, connect, make_lean
from conserve_sdk.identity import HEADER_CONVERSATION, current_conversation, wire_id

_WIRING = frozenset({"http_client", "http_async_client", "base_url", "openai_api_base"})
_NOT_PICKLED = _WIRING | {
    "broker_api_key",
    "conserve",
    "client",
    "async_client",
    "root_client",
    "root_async_client",
}
_CONFIG_CONVERSATION = "conserve_config_conversation"
_CHUNK_TIMEOUT_VARIABLE = "LANGCHAIN_OPENAI_STREAM_CHUNK_TIMEOUT_S"

_WAIT_FOR_LOSES_CANCELLATIONS = sys.version_info < (3, 12)
"""langchain-openai reads async streams by `asyncio.wait_for`, once a chunk. On Python 3.11 that loses a cancellation
which meets a chunk: a graph whose reader left would wait for the whole answer, and the engine would compute it.
"""


class ConServeChat(BaseChatOpenAI):
    """Chat model over a ConServe broker, usable wherever LangChain takes a chat model and as a LangGraph node.

    As a node it reads `state["messages"]` and answers `{"messages": [answer]}`, also after `bind_tools`. The
    conversation is LangGraph's `thread_id`; what else can name it, the most explicit first:

    1. `conversation_id=` of the call (or of `bind`), or the header `X-ConServe-Conversation` in `extra_headers`
    2. `conversation_id=` of the model
    3. `with conserve_sdk.conversation(id)` around the call
    4. `config["configurable"]`: `conserve_conversation_id`, `thread_id`
    5. `config["metadata"]`: `conversation_id`, `session_id`, `thread_id`

    A call that nothing names still gets a lease, by the content of its messages.

    Example:
        ```python
        llm = ConServeChat(model="qwen", broker_url="http://broker:7070")
        builder = StateGraph(MessagesState)
        builder.add_node("agent", llm.bind_tools(tools))
        ```

    Attributes:
        broker_url: one broker, or several of which the first that answers is used. Default: `CONSERVE_BROKER_URL`.
        conserve: a `conserve_sdk.ConServe` of your own, instead of `broker_url`. Models with the same `broker_url`
            share one per process.
        broker_api_key: this program's key at the broker. Default: `CONSERVE_BROKER_API_KEY`, which is also where a
            copy in another process takes it from: pickles and `dumpd` leave it out.
        conversation_id: conversation of every call of this model object; leave it out in graphs.
        stream_chunk_timeout: as in `ChatOpenAI`, but off by default on Python 3.11, where it makes a stream that is
            left run on; silence is bounded by `Timeouts.read_s` there.

    Raises:
        ConfigError: neither `broker_url`, `conserve` nor the environment names a broker (from the constructor).
    """

    broker_url: str | Sequence[str] | None = None
    conserve: ConServe | Any = Field(default=None, exclude=True, repr=False)
    broker_api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    conversation_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _wire_conserve(cls, values: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_WIRING.intersection(values))
        if taken:
            raise ValueError(f"ConServeChat makes its own HTTP clients: leave out {', '.join(taken)}, give broker_url")
        conserve = values.get("conserve") or connect(
            values.get("broker_url"), broker_api_key=_plain(values.get("broker_api_key"))
        )
        # langchain-openai switches stream_usage off for any custom client; without usage nothing can be accounted.
        defaults: dict[str, Any] = {"stream_usage": True}
        if _WAIT_FOR_LOSES_CANCELLATIONS and _CHUNK_TIMEOUT_VARIABLE not in os.environ:
            defaults["stream_chunk_timeout"] = None
        if not {"api_key", "openai_api_key"} & set(values):
            defaults["api_key"] = "EMPTY"
        clients = clients_of(conserve)
        wiring = {
            "conserve": conserve,
            "base_url": BASE_URL,
            "http_client": clients.blocking,
            "http_async_client": clients.nonblocking,
        }
        return defaults | values | wiring

    @model_validator(mode="after")
    def _make_lean(self) -> Self:
        # The clients that `ChatOpenAI` has just made, not any that it was given.
        root, nonblocking = self.root_client, self.root_async_client
        if root is not None and self.client is root.chat.completions:
            self.client = make_lean(root).chat.completions
        if nonblocking is not None and self.async_client is nonblocking.chat.completions:
            self.async_client = make_lean(nonblocking).chat.completions
        return self

    @property
    def _llm_type(self) -> str:
        return "conserve-chat"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return super()._get_ls_params(stop=stop, **kwargs) | LangSmithParams(ls_provider="conserve")

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Name the conversation in a header: the one hook that every LangChain path crosses (`stream_events` too)."""
        given = kwargs.pop("conversation_id", None)
        from_config = kwargs.pop(_CONFIG_CONVERSATION, None)
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        headers = dict(payload.get("extra_headers") or {})
        in_headers = [headers.pop(name) for name in tuple(headers) if name.lower() == HEADER_CONVERSATION.lower()]
        explicit = given or next(iter(in_headers), None) or self.conversation_id
        thread = from_config or conversation_of(None)
        # Inside `with conversation(...)` the transport sees id and lineage itself: a header would hide the lineage.
        scoped = None if explicit else current_conversation()
        conversation = explicit or scoped or thread
        if conversation:
            conversation = wire_id(str(conversation))
            note_turn(self.conserve, conversation, thread=thread)
            if not scoped:
                headers[HEADER_CONVERSATION] = conversation
        if headers:
            payload["extra_headers"] = headers
        return payload

    def invoke(
        self,
        input: Any,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer a prompt with a message, or a graph's state with `{"messages": [message]}`."""
        messages, named = messages_of_state(input), _with_conversation(kwargs, config)
        answer = super().invoke(input if messages is None else messages, config, stop=stop, **named)
        return answer if messages is None else {"messages": [answer]}

    async def ainvoke(
        self,
        input: Any,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like `invoke`."""
        messages, named = messages_of_state(input), _with_conversation(kwargs, config)
        answer = await super().ainvoke(input if messages is None else messages, config, stop=stop, **named)
        return answer if messages is None else {"messages": [answer]}

    def stream(
        self,
        input: Any,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """Stream chunks of the answer; for a graph's state each chunk is `{"messages": [chunk]}`."""
        messages, named = messages_of_state(input), _with_conversation(kwargs, config)
        if messages is None:
            return super().stream(input, config, stop=stop, **named)
        return _as_states(super().stream(messages, config, stop=stop, **named))

    def astream(
        self,
        input: Any,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        """Like `stream`. Returns the base class's iterator itself, so that closing it closes the request."""
        messages, named = messages_of_state(input), _with_conversation(kwargs, config)
        if messages is None:
            return super().astream(input, config, stop=stop, **named)
        return _as_states_async(super().astream(messages, config, stop=stop, **named))

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[Any, AIMessage]:
        """Bind tools; the result is a chat model and a graph node like this one. Arguments as in `ChatOpenAI`.

        Args:
            tools: tools, functions, pydantic models or OpenAI tool dictionaries.
            tool_choice: `auto`, `none`, `required`, or the name of a tool.
            strict: make vLLM hold the arguments to the tool's schema (it does so only for strict tools).
            parallel_tool_calls: allow several calls in one answer.
            **kwargs: further fields of the request.
        """
        return super().bind_tools(
            tools, tool_choice=tool_choice, strict=strict, parallel_tool_calls=parallel_tool_calls, **kwargs
        )

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Share the HTTP clients: they hold sockets and locks, which no copy could own."""
        return self.model_copy()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the constructor's arguments; the other process makes its own connections."""
        given = {name: getattr(self, name) for name in self.model_fields_set if name not in _NOT_PICKLED}
        if not self._is_connected_by_url():
            given["conserve"] = self.conserve
        return (_rebuild, (type(self), given))

    def _is_connected_by_url(self) -> bool:
        """Whether `connect` would give the other process what this one has."""
        try:
            return connect(self.broker_url, broker_api_key=_plain(self.broker_api_key)) is self.conserve
        except ConfigError:
            return False


ChatConServe = ConServeChat
"""The same class under the name that LangChain's partner packages would give it."""


def _plain(secret: SecretStr | str | None) -> str | None:
    return secret.get_secret_value() if isinstance(secret, SecretStr) else secret


def _rebuild(kind: type[ConServeChat], given: dict[str, Any]) -> ConServeChat:
    return kind(**given)


def _with_conversation(kwargs: dict[str, Any], config: RunnableConfig | None) -> dict[str, Any]:
    conversation = conversation_of(config)
    return kwargs if conversation is None else {**kwargs, _CONFIG_CONVERSATION: conversation}


def _as_states(chunks: Iterator[Any]) -> Iterator[dict[str, list[Any]]]:
    with closing(chunks) as stream:  # type: ignore[type-var]  # a generator at run time
        for chunk in stream:
            yield {"messages": [chunk]}


async def _as_states_async(chunks: AsyncIterator[Any]) -> AsyncIterator[dict[str, list[Any]]]:
    async with aclosing(chunks) as stream:  # type: ignore[type-var]  # a generator at run time
        async for chunk in stream:
            yield {"messages": [chunk]}

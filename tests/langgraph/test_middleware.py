"""ConServeMiddleware, for agents whose model is a `ChatOpenAI` of their own."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware, ModelRequest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver

from conserve_lab.stack import LocalStack
from conserve_langgraph import ConServeMiddleware
from conserve_sdk import BASE_URL, ConServe, connect, conversation
from conserve_sdk.errors import ConfigError
from conserve_sdk.identity import HEADER_CONVERSATION
from conserve_sdk.protocol import LeaseExplanation
from conserve_sdk.telemetry import TurnCollector

LONG = "Here is the listing of the repository. " * 60


@tool
def word_count(text: str) -> int:
    """Count the words of a text."""
    return len(text.split())


@tool(return_direct=True)
def last_word(text: str) -> str:
    """Count nothing: what it returns is the answer."""
    return text


@pytest.fixture
def model(stack: LocalStack, conserve: ConServe) -> ChatOpenAI:
    return ChatOpenAI(
        model=stack.model,
        base_url=BASE_URL,
        api_key="EMPTY",
        stream_usage=True,
        http_client=conserve.http_client(),
        http_async_client=conserve.async_http_client(),
    )


def _config() -> Any:
    return {"configurable": {"thread_id": f"own-{uuid4().hex[:10]}"}}


def _ask() -> Any:
    return {"messages": [HumanMessage(LONG + "Count the words.")]}


def _assert_one_lease(turns: TurnCollector, thread: str) -> None:
    assert len(turns.records) >= 3
    assert {record.conversation_id for record in turns.records} == {thread}
    assert len({record.lease_id for record in turns.records}) == 1
    assert sum(record.migrated for record in turns.records) == 1


def _waits_for_nothing(conserve: ConServe) -> bool:
    kit = conserve._runtime.kit
    return kit.registry.next_renewal_ms(now_ms=kit.now_ms()) is None


def test_the_thread_is_the_conversation(model: ChatOpenAI, conserve: ConServe, turns: TurnCollector) -> None:
    config = _config()
    create_agent(model, [word_count], middleware=[ConServeMiddleware(conserve)]).invoke(_ask(), config)
    _assert_one_lease(turns, config["configurable"]["thread_id"])
    assert _waits_for_nothing(conserve)


async def test_async_and_streamed(model: ChatOpenAI, conserve: ConServe, turns: TurnCollector) -> None:
    config = _config()
    async with conserve:
        agent = create_agent(model, [word_count], middleware=[ConServeMiddleware(conserve)])
        async for _ in agent.astream(_ask(), config, stream_mode="messages"):
            pass
        _assert_one_lease(turns, config["configurable"]["thread_id"])
        assert all(record.prompt_tokens for record in turns.records)
        assert _waits_for_nothing(conserve)


def test_the_agents_end_is_idle_even_after_a_tool_call(
    model: ChatOpenAI, conserve: ConServe, turns: TurnCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(conserve, "idle", told.append)
    config = _config()
    middleware = ConServeMiddleware(conserve)
    create_agent(model, [last_word], middleware=[middleware]).invoke(_ask(), config)
    assert turns.records[-1].finish_reason == "tool_calls"
    assert set(told) == {config["configurable"]["thread_id"]}


async def test_after_agent_alone_marks_idle(conserve: ConServe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook does it by itself, also where LangChain's callbacks are switched off."""
    told: list[str] = []
    monkeypatch.setattr(conserve, "idle", told.append)
    middleware = ConServeMiddleware(conserve)
    middleware.after_agent({}, runtime=None)  # type: ignore[arg-type]  # not read
    with conversation("named"):
        middleware.after_agent({}, runtime=None)  # type: ignore[arg-type]
        await middleware.aafter_agent({}, runtime=None)  # type: ignore[arg-type]
    assert told == ["named", "named"]


def test_an_interrupt_parks(
    model: ChatOpenAI,
    conserve: ConServe,
    turns: TurnCollector,
    lease_now: Callable[[str], LeaseExplanation | None],
    until: Callable[[Callable[[], bool]], None],
) -> None:
    agent = create_agent(
        model,
        [word_count],
        middleware=[ConServeMiddleware(conserve), HumanInTheLoopMiddleware(interrupt_on={"word_count": True})],
        checkpointer=InMemorySaver(),
    )
    assert "__interrupt__" in agent.invoke(_ask(), _config())
    lease_id = turns.records[0].lease_id
    assert lease_id
    until(lambda: (lease := lease_now(lease_id)) is not None and lease.activity == "parked")


def _headers(request: ModelRequest[Any], middleware: ConServeMiddleware) -> dict[str, str]:
    seen: list[ModelRequest[Any]] = []

    def handler(given: ModelRequest[Any]) -> Any:
        seen.append(given)
        return AIMessage("")

    middleware.wrap_model_call(request, handler)
    return dict(seen[0].model_settings.get("extra_headers") or {})


def test_explicit_names_and_foreign_models_are_left_alone(model: ChatOpenAI, conserve: ConServe) -> None:
    middleware = ConServeMiddleware(conserve)
    elsewhere = ChatOpenAI(model="m", base_url="http://other.example/v1", api_key="k")
    fake = GenericFakeChatModel(messages=iter(()))
    own = {"extra_headers": {HEADER_CONVERSATION.lower(): "mine"}}
    assert _headers(ModelRequest(model=model, messages=[]), middleware) == {}, "nothing names it"
    with conversation("block"):
        for other in (elsewhere, fake):
            assert _headers(ModelRequest(model=other, messages=[]), middleware) == {}
        assert _headers(ModelRequest(model=model, messages=[]), middleware) == {}, "the transport sees the block"
        kept = _headers(ModelRequest(model=model, messages=[], model_settings=own), middleware)
    assert kept == own["extra_headers"]


def test_it_connects_by_url_or_environment(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = connect(stack.broker_url)
    assert ConServeMiddleware(stack.broker_url)._conserve is shared
    monkeypatch.setenv("CONSERVE_BROKER_URL", stack.broker_url)
    assert ConServeMiddleware()._conserve is shared
    monkeypatch.delenv("CONSERVE_BROKER_URL")
    with pytest.raises(ConfigError, match="CONSERVE_BROKER_URL"):
        ConServeMiddleware()
    shared.close()

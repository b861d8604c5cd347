"""ConServeChat as a LangGraph node: real graphs, a broker, emulated engines."""

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, Any
from uuid import uuid4

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, AnyMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph, add_messages
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from conserve_lab.stack import LocalStack
from conserve_langgraph import ConServeChat
from conserve_sdk.telemetry import TurnCollector

LONG = "Here is the listing of the repository. " * 120


@tool
def word_count(text: str) -> int:
    """Count the words of a text."""
    return len(text.split())


@pytest.fixture
def graph(llm: ConServeChat) -> CompiledStateGraph[Any, Any, Any, Any]:
    builder = StateGraph(MessagesState)
    builder.add_node("agent", llm.bind_tools([word_count]))
    builder.add_node("tools", ToolNode([word_count]))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", tools_condition)
    builder.add_edge("tools", "agent")
    return builder.compile(checkpointer=InMemorySaver())


def _config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}, "recursion_limit": 40}


def _ask(text: str) -> Any:
    return {"messages": [HumanMessage(LONG + text)]}


def test_tool_loop_moves_once_and_stays(
    graph: CompiledStateGraph[Any, Any, Any, Any], turns: TurnCollector, stack: LocalStack
) -> None:
    thread = f"loop-{uuid4().hex[:8]}"
    state = graph.invoke(_ask("Count the words."), _config(thread))
    messages = state["messages"]
    assert isinstance(messages[-1], AIMessage)
    assert any(isinstance(message, ToolMessage) for message in messages)
    records = turns.records
    assert len(records) == sum(isinstance(message, AIMessage) for message in messages) >= 3
    assert {record.conversation_id for record in records} == {thread}
    assert [record.migrated for record in records] == [True] + [False] * (len(records) - 1)
    assert [record.prefill_engine_id is not None for record in records] == [True] + [False] * (len(records) - 1)
    assert len({record.decoder_id for record in records}) == 1
    assert all(record.cached_tokens > record.prompt_tokens * 0.8 for record in records[1:])


def test_second_user_turn_of_a_thread_stays_on_its_decoder(
    graph: CompiledStateGraph[Any, Any, Any, Any], turns: TurnCollector
) -> None:
    thread = f"second-{uuid4().hex[:8]}"
    graph.invoke(_ask("Count the words."), _config(thread))
    first = len(turns.records)
    graph.invoke({"messages": [HumanMessage("And once more?")]}, _config(thread))
    assert len(turns.records) > first
    assert len({(record.lease_id, record.decoder_id) for record in turns.records}) == 1
    assert sum(record.migrated for record in turns.records) == 1


async def test_concurrent_threads_do_not_mix(
    graph: CompiledStateGraph[Any, Any, Any, Any], llm: ConServeChat, turns: TurnCollector
) -> None:
    async with llm.conserve:
        threads = [f"many-{number}-{uuid4().hex[:8]}" for number in range(8)]
        states = await asyncio.gather(
            *(graph.ainvoke(_ask(f"Count for {thread}."), _config(thread)) for thread in threads)
        )
        for thread, state in zip(threads, states, strict=True):
            records = [record for record in turns.records if record.conversation_id == thread]
            assert len(records) == sum(isinstance(message, AIMessage) for message in state["messages"])
            assert len({record.decoder_id for record in records}) == 1
            assert sum(record.migrated for record in records) == 1


def test_graph_streams_tokens_of_the_node(graph: CompiledStateGraph[Any, Any, Any, Any], turns: TurnCollector) -> None:
    chunks = list(graph.stream(_ask("Count."), _config(uuid4().hex), stream_mode="messages"))
    assert sum(isinstance(chunk, AIMessageChunk) for chunk, _ in chunks) > len(turns.records)
    assert all(record.tbt_us for record in turns.records)
    assert all(record.prompt_tokens for record in turns.records), "stream_usage must stay on"


@dataclass
class ObjectState:
    messages: Annotated[list[AnyMessage], add_messages] = field(default_factory=list)


async def test_state_may_be_an_object(llm: ConServeChat) -> None:
    async with llm.conserve:
        builder = StateGraph(ObjectState)
        builder.add_node("agent", llm)
        builder.add_edge(START, "agent")
        state = await builder.compile().ainvoke({"messages": [HumanMessage("Hello")]})
        assert isinstance(state["messages"][-1], AIMessage)


async def test_node_called_by_hand_answers_a_state_with_a_state(llm: ConServeChat) -> None:
    async with llm.conserve:
        state = {"messages": [HumanMessage("Hello")]}
        answer = llm.invoke(state)
        assert isinstance(answer["messages"][0], AIMessage)
        chunks = [chunk["messages"][0] for chunk in llm.stream(state)]
        assert "".join(chunk.text for chunk in chunks) == answer["messages"][0].text
        again = [chunk["messages"][0] async for chunk in llm.astream(state)]
        assert "".join(chunk.text for chunk in again) == answer["messages"][0].text


def test_state_without_messages_says_what_it_found(llm: ConServeChat) -> None:
    with pytest.raises(ValueError, match="reads the state's key 'messages'; this state has: history, turns"):
        llm.invoke({"turns": 1, "history": []})

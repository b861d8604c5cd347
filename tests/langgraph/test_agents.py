"""Agents and graphs as LangChain and LangGraph build them: one lease for each growing prefix, whatever the shape."""

import operator
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, TypedDict
from uuid import uuid4

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ClearToolUsesEdit, ContextEditingMiddleware, SummarizationMiddleware
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Send
from pydantic import BaseModel

from conserve_langgraph import ConServeChat
from conserve_sdk import ConServe
from conserve_sdk.protocol import LeaseExplanation
from conserve_sdk.telemetry import TurnCollector, TurnRecord

LONG = "Here is the listing of the repository. " * 60


@tool
def word_count(text: str) -> int:
    """Count the words of a text."""
    return len(text.split())


class Report(BaseModel):
    """What was found."""

    title: str
    pages: int


def _config() -> Any:
    return {"configurable": {"thread_id": f"agent-{uuid4().hex[:10]}"}}


def _ask(text: str = "Count the words.") -> Any:
    return {"messages": [HumanMessage(LONG + text)]}


def _thread(config: Any) -> str:
    return str(config["configurable"]["thread_id"])


def _by_lineage(turns: TurnCollector) -> dict[str, list[TurnRecord]]:
    found: dict[str, list[TurnRecord]] = {}
    for record in turns.records:
        found.setdefault(record.lineage, []).append(record)
    return found


def _assert_one_lease_each(turns: TurnCollector, *, lineages: int, thread: str) -> None:
    """Each lineage has one lease, one decoder, one migration and consecutive turns.

    A tiny one (a short summary) may ride on another's decoder without a lease until it grows.
    """
    assert {record.conversation_id for record in turns.records} == {thread}
    found = _by_lineage(turns)
    assert len(found) == lineages
    for records in found.values():
        assert [record.turn for record in records] == list(range(1, len(records) + 1))
        leased = [record for record in records if record.lease_id]
        assert leased == records[len(records) - len(leased) :]
        assert len({(record.lease_id, record.decoder_id) for record in leased}) <= 1
        assert [record.migrated for record in leased] == [True, *[False] * len(leased)][: len(leased)]


# ---- create_agent ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*(is in beta|is experimental)")
@pytest.mark.parametrize("way", ["invoke", "stream", "events"])
def test_create_agent(llm: ConServeChat, turns: TurnCollector, way: str) -> None:
    agent, config = create_agent(llm, [word_count], system_prompt="You count."), _config()
    match way:
        case "invoke":
            answer = agent.invoke(_ask(), config)["messages"][-1]
        case "stream":
            chunks = [part for part, _ in agent.stream(_ask(), config, stream_mode="messages")]
            tokens = [chunk for chunk in chunks if isinstance(chunk, AIMessageChunk)]
            assert len(tokens) > 2 * len(turns.records), "tokens come one by one"
            answer = tokens[-1]
        case _:
            answer = agent.stream_events(_ask(), config, version="v3").output["messages"][-1]
    assert isinstance(answer, AIMessage | AIMessageChunk)
    assert len(turns.records) >= 3
    _assert_one_lease_each(turns, lineages=1, thread=_thread(config))


@pytest.mark.filterwarnings("ignore:.*(is in beta|is experimental)")
@pytest.mark.parametrize("way", ["ainvoke", "astream", "events v2", "events v3"])
async def test_create_agent_async(llm: ConServeChat, turns: TurnCollector, way: str) -> None:
    agent, config = create_agent(llm, [word_count]), _config()
    async with llm.conserve:
        match way:
            case "ainvoke":
                assert (await agent.ainvoke(_ask(), config))["messages"][-1].text
            case "astream":
                async for _ in agent.astream(_ask(), config, stream_mode="messages"):
                    pass
            case "events v2":
                kinds = Counter([e["event"] async for e in agent.astream_events(_ask(), config, version="v2")])
                assert kinds["on_chat_model_end"] == len(turns.records)
                assert kinds["on_chat_model_stream"] > 2 * len(turns.records)
            case _:
                events = await agent.astream_events(_ask(), config, version="v3")
                assert (await events.output())["messages"][-1].text
        _assert_one_lease_each(turns, lineages=1, thread=_thread(config))


def test_agent_with_structured_answer(llm: ConServeChat, turns: TurnCollector) -> None:
    config = _config()
    state = create_agent(llm, [], response_format=ToolStrategy(Report)).invoke(_ask("Report."), config)
    assert isinstance(state["structured_response"], Report)
    _assert_one_lease_each(turns, lineages=1, thread=_thread(config))


# ---- shapes of graphs -----------------------------------------------------------------------------------------


def test_two_nodes_on_one_state_are_one_lineage(llm: ConServeChat, turns: TurnCollector) -> None:
    builder, config = StateGraph(MessagesState), _config()
    builder.add_node("plan", llm)
    builder.add_node("act", llm)
    builder.add_edge(START, "plan")
    builder.add_edge("plan", "act")
    builder.compile().invoke(_ask(), config)
    assert len(turns.records) == 2
    _assert_one_lease_each(turns, lineages=1, thread=_thread(config))


def test_subgraphs_belong_to_the_thread(llm: ConServeChat, turns: TurnCollector) -> None:
    """Two levels down, with a checkpointer at the top: the thread is the same, and so is the growing prefix."""
    graph: Any = llm
    for saver in (None, None, InMemorySaver()):
        builder = StateGraph(MessagesState)
        builder.add_node("inner", graph)
        builder.add_edge(START, "inner")
        graph = builder.compile(checkpointer=saver)
    config = _config()
    graph.invoke(_ask(), config)
    graph.invoke({"messages": [HumanMessage("And again.")]}, config)
    assert len(turns.records) == 2
    _assert_one_lease_each(turns, lineages=1, thread=_thread(config))


class Topics(TypedDict):
    topics: list[str]
    found: Annotated[list[str], operator.add]


def test_branches_of_a_fan_out_have_a_lineage_each(llm: ConServeChat, turns: TurnCollector) -> None:
    """LangGraph gives the branches of `Send` the same names: only what they say tells them apart."""

    def branch(state: Any) -> dict[str, Any]:
        asked = [SystemMessage("You research. " * 40), HumanMessage(f"Research {state['topic']}. " * 40)]
        answer = llm.invoke(asked)
        return {"found": [llm.invoke([*asked, answer, HumanMessage("And more?")]).text]}

    builder, config = StateGraph(Topics), _config()
    builder.add_node("branch", branch)
    builder.add_conditional_edges(
        START, lambda state: [Send("branch", {"topic": topic}) for topic in state["topics"]], ["branch"]
    )
    builder.compile().invoke({"topics": ["wheat", "barley", "rye"], "found": []}, config)
    assert len(turns.records) == 6
    _assert_one_lease_each(turns, lineages=3, thread=_thread(config))


def test_agent_as_tool_has_its_own_lineage_in_the_same_thread(llm: ConServeChat, turns: TurnCollector) -> None:
    worker = create_agent(llm, [word_count], system_prompt="You work alone. " * 60, name="worker")

    @tool
    def delegate(task: str) -> str:
        """Count with the help of a worker."""
        return str(worker.invoke(_ask(f"Work on {task}"))["messages"][-1].text)

    config = _config()
    create_agent(llm, [delegate], system_prompt="You lead. " * 80).invoke(_ask(), config)
    found = _by_lineage(turns)
    _assert_one_lease_each(turns, lineages=len(found), thread=_thread(config))
    leader, *workers = found.values()
    assert len(leader) > 1
    assert workers
    assert turns.records[-1] in leader, "the leader's lineage goes on after its workers'"


def test_agents_on_threads_of_their_own_are_conversations_of_their_own(llm: ConServeChat, turns: TurnCollector) -> None:
    inner = _config()
    worker = create_agent(llm, [])

    @tool
    def delegate(task: str) -> str:
        """Count with the help of a worker."""
        return str(worker.invoke(_ask(f"Work on {task}"), inner)["messages"][-1].text)

    config = _config()
    create_agent(llm, [delegate]).invoke(_ask(), config)
    assert {record.conversation_id for record in turns.records} == {_thread(config), _thread(inner)}


# ---- middleware that rewrites the history ---------------------------------------------------------------------

REWRITERS: dict[str, Callable[[ConServeChat], Any]] = {
    "summaries": lambda llm: SummarizationMiddleware(model=llm, trigger=("messages", 8), keep=("messages", 3)),
    "edits": lambda llm: ContextEditingMiddleware(edits=[ClearToolUsesEdit(trigger=200, keep=1)]),
}


@pytest.mark.parametrize("middleware", REWRITERS.values(), ids=REWRITERS.keys())
def test_a_rewritten_history_is_a_first_turn_and_nothing_else_is(
    llm: ConServeChat, turns: TurnCollector, middleware: Callable[[ConServeChat], Any]
) -> None:
    agent = create_agent(
        llm, [word_count], system_prompt="You count. ", middleware=[middleware(llm)], checkpointer=InMemorySaver()
    )
    config = _config()
    for number in range(3):
        state = agent.invoke(_ask(str(number)), config)
    assert any(isinstance(message, ToolMessage) for message in state["messages"])
    found = _by_lineage(turns)
    assert len(found) > 1, "the middleware did rewrite"
    assert max(len(records) for records in found.values()) > 1, "and between rewrites the prefix grew"
    _assert_one_lease_each(turns, lineages=len(found), thread=_thread(config))
    follow_ups = [record for records in found.values() for record in records[1:]]
    assert all(record.cached_tokens > 0 for record in follow_ups)


@pytest.mark.parametrize("middleware", REWRITERS.values(), ids=REWRITERS.keys())
def test_a_rewritten_history_gives_the_lease_of_the_old_one_back(
    llm: ConServeChat,
    conserve: ConServe,
    turns: TurnCollector,
    lease_now: Callable[[str], LeaseExplanation | None],
    middleware: Callable[[ConServeChat], Any],
) -> None:
    aside = ConServeChat(model=llm.model_name, conserve=conserve, conversation_id=f"summaries-{uuid4().hex[:10]}")
    agent = create_agent(
        llm, [word_count], system_prompt="You count. ", middleware=[middleware(aside)], checkpointer=InMemorySaver()
    )
    config = _config()
    for number in range(3):
        agent.invoke(_ask(str(number)), config)
    assert conserve.flush(60)
    leases = [record.lease_id for record in turns.records if record.conversation_id == _thread(config)]
    assert len(set(leases)) > 2, "the middleware did rewrite"
    assert {lease_id for lease_id in set(leases) if lease_id and lease_now(lease_id)} == {leases[-1]}

"""What END and interrupts do to a lease: nothing that anybody must remember to ask for."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, interrupt

from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack
from conserve_langgraph import ConServeCallbackHandler, ConServeChat, callbacks
from conserve_sdk import ConServe
from conserve_sdk.protocol import FleetInfo, LeaseExplanation
from conserve_sdk.telemetry import TurnCollector

Graph = CompiledStateGraph[Any, Any, Any, Any]
LeaseNow = Callable[[str], LeaseExplanation | None]
Until = Callable[[Callable[[], bool]], None]
QUESTION = {"messages": [HumanMessage("Delete the file `notes.txt`. " + "It is old. " * 200)]}


@pytest.fixture(scope="module")
def stack() -> Iterator[LocalStack]:
    """One tool call per question."""
    fleet = default_fleet(time_scale=0.0, tool_calls_min=1, tool_calls_max=1)
    with LocalStack(
        fleet=fleet, preset="paper", settings={"lease": {"ttl_ms": 600_000, "park_ttl_ms": 600_000}}
    ) as stack:
        yield stack


@pytest.fixture(scope="module")
def stack_for_short_parks() -> Iterator[LocalStack]:
    """A lease lives for ten minutes, a parked one for a second."""
    fleet = default_fleet(time_scale=0.0, tool_calls_min=1, tool_calls_max=1)
    lease = {"ttl_ms": 600_000, "park_ttl_ms": 1_000, "grace_ms": 0}
    with LocalStack(fleet=fleet, preset="paper", settings={"lease": lease}) as stack:
        yield stack


@tool
def delete_file(path: str) -> str:
    """Delete a file, if a person agrees."""
    return "deleted" if interrupt(f"Delete {path}?") == "yes" else "kept"


@tool
def plain_delete(path: str) -> str:
    """Delete a file."""
    return f"deleted {path}"


@tool(return_direct=True)
def last_word(text: str) -> str:
    """Delete nothing: what it returns is the answer."""
    return text


def _agent(llm: ConServeChat, *tools: Any, **compiled: Any) -> Graph:
    builder = StateGraph(MessagesState)
    builder.add_node("agent", llm.bind_tools(tools))
    builder.add_node("tools", ToolNode(tools))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", tools_condition)
    builder.add_edge("tools", "agent")
    return builder.compile(checkpointer=InMemorySaver(), **compiled)


def _config() -> Any:
    return {"configurable": {"thread_id": f"life-{uuid4().hex[:10]}"}}


def _waits_for_nothing(conserve: ConServe) -> bool:
    kit = conserve._runtime.kit
    return kit.registry.next_renewal_ms(now_ms=kit.now_ms()) is None


def _is(lease_now: LeaseNow, lease_id: str, activity: str) -> Callable[[], bool]:
    return lambda: (lease := lease_now(lease_id)) is not None and lease.activity == activity


def fleet_info(stack: LocalStack) -> FleetInfo:
    return FleetInfo.model_validate_json(httpx2.get(f"{stack.broker_url}/v1/fleet", timeout=30).content)


# ---- END ------------------------------------------------------------------------------------------------------


def test_after_end_the_lease_is_idle_and_not_renewed(
    llm: ConServeChat, conserve: ConServe, turns: TurnCollector, lease_now: LeaseNow
) -> None:
    _agent(llm, plain_delete).invoke(QUESTION, _config())
    assert [record.finish_reason for record in turns.records] == ["tool_calls", "stop"]
    assert conserve.flush(30)
    assert _is(lease_now, turns.records[0].lease_id, "idle")()
    assert _waits_for_nothing(conserve)


def test_a_run_that_ends_in_a_tool_call_is_not_renewed_either(
    llm: ConServeChat, conserve: ConServe, turns: TurnCollector
) -> None:
    create_agent(llm, [last_word]).invoke(QUESTION, _config())
    assert [record.finish_reason for record in turns.records] == ["tool_calls"]
    assert _waits_for_nothing(conserve)


async def test_a_run_that_fails_or_is_abandoned_is_not_renewed(llm: ConServeChat, turns: TurnCollector) -> None:
    def fails(state: MessagesState) -> None:
        raise OSError("disk full")

    def graph() -> Graph:
        builder = StateGraph(MessagesState)
        builder.add_node("agent", llm.bind_tools([plain_delete]))
        builder.add_node("fails", fails)
        builder.add_edge(START, "agent")
        builder.add_edge("agent", "fails")
        return builder.compile()

    async with llm.conserve:
        with pytest.raises(OSError, match="disk full"):
            graph().invoke(QUESTION, _config())
        assert _waits_for_nothing(llm.conserve)
        with pytest.raises(OSError, match="disk full"):
            await graph().ainvoke(QUESTION, _config())
        assert _waits_for_nothing(llm.conserve)
        stream = graph().stream(QUESTION, _config())
        next(stream)
        stream.close()
        assert _waits_for_nothing(llm.conserve)
        assert [record.finish_reason for record in turns.records] == ["tool_calls"] * 3


def test_between_the_turns_of_a_tool_loop_the_lease_is_kept(
    llm: ConServeChat, conserve: ConServe, turns: TurnCollector
) -> None:
    """Also while the tool runs an agent of its own on the same thread, which ends before the loop goes on."""
    seen: list[bool] = []
    worker = create_agent(llm, [], name="worker")

    @tool
    def delete_by_agent(path: str) -> str:
        """Delete a file with another agent's help."""
        answer = worker.invoke({"messages": [HumanMessage(f"How does one delete {path}? " * 100)]})
        seen.append(_waits_for_nothing(conserve))
        return str(answer["messages"][-1].text)

    create_agent(llm, [delete_by_agent]).invoke(QUESTION, _config())
    assert seen == [False]
    assert _waits_for_nothing(conserve)
    assert len({record.conversation_id for record in turns.records}) == 1
    assert len({record.lineage for record in turns.records}) == 2


def test_a_loop_of_ones_own_outside_any_graph_is_left_alone(llm: ConServeChat, conserve: ConServe) -> None:
    """A chain that returns between two turns of a hand-written tool loop is no END."""
    chain = RunnableLambda(lambda text: [HumanMessage(text)]) | llm.bind_tools([plain_delete])
    answer = chain.invoke("Delete `a.txt`", _config())
    assert isinstance(answer, AIMessage)
    assert answer.tool_calls
    assert not _waits_for_nothing(conserve)


# ---- interrupts -----------------------------------------------------------------------------------------------


def test_an_interrupt_parks_and_the_answer_finds_the_lease(
    llm: ConServeChat, conserve: ConServe, turns: TurnCollector, lease_now: LeaseNow, until: Until
) -> None:
    graph, config = _agent(llm, delete_file), _config()
    assert "__interrupt__" in graph.invoke(QUESTION, config)
    until(_is(lease_now, turns.records[0].lease_id, "parked"))
    assert _waits_for_nothing(conserve)
    graph.invoke(Command(resume="yes"), config)
    assert [record.turn for record in turns.records] == [1, 2]
    assert len({record.lease_id for record in turns.records}) == 1
    assert conserve.flush(30)
    assert _is(lease_now, turns.records[0].lease_id, "idle")()


def test_hours_later_the_answer_starts_a_first_turn_again(stack_for_short_parks: LocalStack, until: Until) -> None:
    turns = TurnCollector()
    with ConServe(stack_for_short_parks.broker_url, on_turn=turns) as conserve:
        graph, config = _agent(ConServeChat(model="emulated", conserve=conserve), delete_file), _config()
        graph.invoke(QUESTION, config)
        until(lambda: fleet_info(stack_for_short_parks).leases == 0)  # no KV is held for a human
        state = graph.invoke(Command(resume="yes"), config)
    assert "deleted" in [message.text for message in state["messages"]]
    first, second = turns.records
    assert (first.migrated, second.migrated) == (True, True)
    assert second.lease_id != first.lease_id
    assert second.lineage == first.lineage


async def test_interrupts_of_async_runs_park_without_holding_up_the_loop(
    llm: ConServeChat, conserve: ConServe, turns: TurnCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_park, parked = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    counts: list[int] = []

    def park(self: ConServe, conversation_id: str) -> int:
        assert may_park.wait(60), "the run did not return while the broker was slow"
        counts.append(original(self, conversation_id))
        if counts[-1]:  # other tests' objects know nothing of this thread
            loop.call_soon_threadsafe(parked.set)
        return counts[-1]

    original = ConServe.park
    monkeypatch.setattr(ConServe, "park", park)
    async with conserve:
        state = await _agent(llm, delete_file).ainvoke(QUESTION, _config())
        assert "__interrupt__" in state
        assert not counts
        may_park.set()
        await asyncio.wait_for(parked.wait(), 60)
        assert sum(counts) == 1


def test_the_prebuilt_human_in_the_loop_middleware_parks(
    llm: ConServeChat, turns: TurnCollector, lease_now: LeaseNow, until: Until
) -> None:
    agent = create_agent(
        llm,
        [plain_delete],
        middleware=[HumanInTheLoopMiddleware(interrupt_on={"plain_delete": True})],
        checkpointer=InMemorySaver(),
    )
    config = _config()
    assert "__interrupt__" in agent.invoke(QUESTION, config)
    until(_is(lease_now, turns.records[0].lease_id, "parked"))
    state = agent.invoke(Command(resume={"decisions": [{"type": "approve"}]}), config)
    assert state["messages"][-1].text
    assert {record.conversation_id for record in turns.records} == {config["configurable"]["thread_id"]}


def test_a_compiled_breakpoint_parks_with_the_handler_in_the_config(
    llm: ConServeChat, turns: TurnCollector, lease_now: LeaseNow, until: Until
) -> None:
    graph = _agent(llm, plain_delete, interrupt_before=["tools"])
    graph.with_config(callbacks=[ConServeCallbackHandler()]).invoke(QUESTION, _config())
    until(_is(lease_now, turns.records[0].lease_id, "parked"))


def test_a_compiled_breakpoint_without_the_handler_is_an_end(
    llm: ConServeChat, conserve: ConServe, turns: TurnCollector, lease_now: LeaseNow
) -> None:
    _agent(llm, plain_delete, interrupt_before=["tools"]).invoke(QUESTION, _config())
    assert conserve.flush(30)
    assert _is(lease_now, turns.records[0].lease_id, "idle")()
    assert _waits_for_nothing(conserve)


def test_an_interrupt_before_any_turn_parks_what_an_earlier_run_left(
    llm: ConServeChat, conserve: ConServe, turns: TurnCollector, lease_now: LeaseNow, until: Until
) -> None:
    config = _config()
    _agent(llm, plain_delete).invoke(QUESTION, config)
    assert conserve.flush(30)

    builder = StateGraph(MessagesState)
    builder.add_node("ask", lambda state: interrupt("Sure?"))
    builder.add_edge(START, "ask")
    builder.compile(checkpointer=InMemorySaver()).invoke(QUESTION, config)
    until(_is(lease_now, turns.records[0].lease_id, "parked"))


def test_a_stream_left_at_its_interrupt_parks(
    llm: ConServeChat, turns: TurnCollector, lease_now: LeaseNow, until: Until
) -> None:
    stream = _agent(llm, delete_file).stream(QUESTION, _config())
    for update in stream:
        if "__interrupt__" in update:
            break
    stream.close()
    until(_is(lease_now, turns.records[0].lease_id, "parked"))


def test_the_functional_api_parks_too(
    llm: ConServeChat, turns: TurnCollector, lease_now: LeaseNow, until: Until
) -> None:
    @task
    def ask(question: str) -> str:
        return str(llm.invoke(question).text)

    @entrypoint(checkpointer=InMemorySaver())
    def workflow(question: str) -> str:
        draft = ask(question).result()
        return f"{interrupt(draft)}: {draft}"

    config = _config()
    list(workflow.stream("Write a draft. " * 100, config))
    until(_is(lease_now, turns.records[0].lease_id, "parked"))
    assert workflow.invoke(Command(resume="fine"), config).startswith("fine: ")


def test_a_quick_answer_is_not_overtaken_by_the_parking(llm: ConServeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Callable[[], bool]] = []
    monkeypatch.setattr(callbacks._parking, "park", lambda conserve, conversation, *, unless: asked.append(unless))
    during: list[bool] = []

    @tool
    def careful_delete(path: str) -> str:
        """Delete a file, if a person agrees."""
        answer = interrupt(path)
        during.extend(unless() for unless in asked)
        return str(answer)

    graph, config = _agent(llm, careful_delete), _config()
    graph.invoke(QUESTION, config)
    assert asked
    assert not any(unless() for unless in asked), "nobody has answered: it is parked"
    graph.invoke(Command(resume="yes"), config)
    assert during
    assert all(during), "the thread runs again: it is left alone"


def test_a_program_that_closes_right_after_the_interrupt_still_parks(
    stack: LocalStack, lease_now: LeaseNow, until: Until
) -> None:
    turns = TurnCollector()
    with ConServe(stack.broker_url, on_turn=turns) as conserve:
        _agent(ConServeChat(model=stack.model, conserve=conserve), delete_file).invoke(QUESTION, _config())
    until(_is(lease_now, turns.records[0].lease_id, "parked"))


def test_parking_after_close_leaves_no_connection(stack: LocalStack, turns: TurnCollector) -> None:
    with ConServe(stack.broker_url, on_turn=turns) as conserve:
        config = _config()
        ConServeChat(model=stack.model, conserve=conserve).invoke(QUESTION["messages"], config)
    assert conserve.park(config["configurable"]["thread_id"]) == 1
    assert conserve._runtime.broker._network is None


def test_a_conversation_that_a_block_names_is_parked_under_that_name(
    llm: ConServeChat, conserve: ConServe, turns: TurnCollector, lease_now: LeaseNow, until: Until
) -> None:
    own = ConServeChat(model=llm.model_name, conserve=conserve, conversation_id=f"own-{uuid4().hex[:8]}")
    _agent(own, delete_file).invoke(QUESTION, _config())
    assert turns.records[0].conversation_id == own.conversation_id
    until(_is(lease_now, turns.records[0].lease_id, "parked"))

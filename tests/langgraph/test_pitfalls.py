"""What goes wrong with model objects in long-lived programs: copies, many of them, loops, streams nobody reads on."""

import asyncio
import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.messages import HumanMessage
from langgraph.graph import START, MessagesState, StateGraph

from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack
from conserve_langgraph import ConServeChat
from conserve_sdk import ConServe, connect
from conserve_sdk.telemetry import TurnCollector

Until = Callable[[Callable[[], bool]], None]
QUESTION = [HumanMessage("What is a lease? " * 40)]
DESCRIPTORS = Path("/proc/self/fd")


# ---- many models ----------------------------------------------------------------------------------------------


def _alive(kind: type) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


def _descriptors() -> int:
    return sum(1 for _ in DESCRIPTORS.iterdir()) if DESCRIPTORS.exists() else 0


def test_two_hundred_models_cost_one_pair_of_http_clients(stack: LocalStack) -> None:
    models = [ConServeChat(model=stack.model, broker_url=stack.broker_url)]
    models[0].invoke(QUESTION)
    kinds = (type(models[0].http_client), type(models[0].http_async_client))
    clients, descriptors = [_alive(kind) for kind in kinds], _descriptors()
    for number in range(200):
        models.append(ConServeChat(model=stack.model, broker_url=stack.broker_url, temperature=number / 200))
        if number % 10 == 0:
            models[-1].invoke(QUESTION)
    assert all(_alive(kind) <= before for kind, before in zip(kinds, clients, strict=True))
    assert len({(id(model.http_client), id(model.http_async_client)) for model in models}) == 1
    # Connections to engines come and go, and both of their ends are in this process; a leak would be 200 and more.
    assert _descriptors() < descriptors + 100
    connect(stack.broker_url).close()


def test_models_go_and_leave_the_shared_clients_open(conserve: ConServe, stack: LocalStack) -> None:
    first, second = (ConServeChat(model=stack.model, conserve=conserve) for _ in range(2))
    first.root_client.close()
    del first
    gc.collect()
    assert second.invoke(QUESTION).text


# ---- copies ---------------------------------------------------------------------------------------------------


def test_pickled_with_its_own_conserve_object(stack: LocalStack, conserve: ConServe) -> None:
    options = pickle.loads(pickle.dumps(ConServe(stack.broker_url, wait_s=7.0)))
    with options, ConServe(stack.broker_url, wait_s=7.0) as own:
        llm = ConServeChat(model=stack.model, conserve=own, temperature=0.5)
        copied = pickle.loads(pickle.dumps(llm))
        assert copied.conserve is not own
        assert copied.temperature == 0.5
        assert copied.invoke(QUESTION).text == llm.invoke(QUESTION).text
        copied.conserve.close()


def test_pickled_where_the_environment_names_the_broker(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSERVE_BROKER_URL", stack.broker_url)
    llm = ConServeChat(model=stack.model)
    copied = pickle.loads(pickle.dumps(llm))
    assert copied.conserve is llm.conserve, "the other process connects by its own environment"
    llm.conserve.close()


def test_bound_models_and_graphs_are_copied(llm: ConServeChat) -> None:
    bound = copy.deepcopy(llm.bind(stop=["zzz"]))
    assert bound.invoke(QUESTION).text
    builder = StateGraph(MessagesState)
    builder.add_node("agent", llm)
    builder.add_edge(START, "agent")
    graph = copy.copy(builder.compile())
    assert graph.invoke({"messages": QUESTION})["messages"][-1].text


# ---- event loops ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_graphs_in_two_event_loops(llm: ConServeChat, turns: TurnCollector) -> None:
    builder = StateGraph(MessagesState)
    builder.add_node("agent", llm)
    builder.add_edge(START, "agent")
    graph, config = builder.compile(), {"configurable": {"thread_id": uuid4().hex}}
    messages: Any = QUESTION
    for _ in range(2):
        state = asyncio.run(graph.ainvoke({"messages": messages}, config))  # type: ignore[arg-type]
        messages = [*state["messages"], HumanMessage("And then?")]
        gc.collect()
    assert len({record.lease_id for record in turns.records}) == 1
    assert [record.migrated for record in turns.records] == [True, False]


# ---- streams --------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_stack() -> Any:
    """Engines that take their time over long answers, so that there is something left to abort."""
    fleet = default_fleet(time_scale=1.0, answer_tokens_min=2_000, answer_tokens_max=2_000)
    with LocalStack(fleet=fleet, preset="paper") as stack:
        yield stack


def _aborted(stack: LocalStack) -> int:
    """Requests whose client went away, as the decoders counted them."""
    return sum(record.status == 499 for engine in stack.fleet.decoders for record in engine.requests)


def test_a_stream_that_is_closed_is_aborted_on_the_engine(slow_stack: LocalStack, until: Until) -> None:
    with ConServe(slow_stack.broker_url) as conserve:
        stream = ConServeChat(model=slow_stack.model, conserve=conserve).stream(QUESTION)
        next(stream)
        stream.close()  # type: ignore[attr-defined]  # a generator at run time
        until(lambda: _aborted(slow_stack) == 1)


async def test_an_async_stream_that_is_closed_is_aborted(slow_stack: LocalStack, until: Until) -> None:
    async with ConServe(slow_stack.broker_url) as conserve:
        stream = ConServeChat(model=slow_stack.model, conserve=conserve).astream(QUESTION)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.to_thread(until, lambda: _aborted(slow_stack) == 1)

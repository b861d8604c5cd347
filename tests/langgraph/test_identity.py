"""Which conversation a call belongs to, in every way that LangChain and LangGraph offer."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.graph import START, MessagesState, StateGraph

from conserve_langgraph import ConServeChat
from conserve_sdk import conversation
from conserve_sdk.telemetry import TurnCollector

QUESTION = [("user", "What is a lease?")]


def _name() -> str:
    return f"t-{uuid4().hex[:10]}"


def _seen(turns: TurnCollector) -> list[str]:
    return [record.conversation_id for record in turns.records]


CONFIGS: dict[str, Callable[[str], Any]] = {
    "thread": lambda name: {"configurable": {"thread_id": name}},
    "own key before thread": lambda name: {"configurable": {"conserve_conversation_id": name, "thread_id": "other"}},
    "metadata conversation": lambda name: {"metadata": {"conversation_id": name}},
    "metadata session": lambda name: {"metadata": {"session_id": name}},
    "metadata thread": lambda name: {"metadata": {"thread_id": name}},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_config_of_a_direct_call(llm: ConServeChat, turns: TurnCollector, config: Callable[[str], Any]) -> None:
    name = _name()
    llm.invoke(QUESTION, config(name))
    assert _seen(turns) == [name]


async def test_config_of_the_async_and_streaming_calls(llm: ConServeChat, turns: TurnCollector) -> None:
    async with llm.conserve:
        names = [_name() for _ in range(4)]
        configs: list[Any] = [{"configurable": {"thread_id": name}} for name in names]
        await llm.ainvoke(QUESTION, configs[0])
        list(llm.stream(QUESTION, configs[1]))
        async for _ in llm.astream(QUESTION, configs[2]):
            pass
        await llm.bind(stop=["zzz"]).ainvoke(QUESTION, configs[3])
        assert _seen(turns) == names


def test_call_argument_wins_over_everything(llm: ConServeChat, turns: TurnCollector) -> None:
    name = _name()
    with conversation("block"):
        llm.bind(conversation_id=name).invoke(QUESTION, {"configurable": {"thread_id": "thread"}})
    assert _seen(turns) == [name]


def test_header_given_by_the_application_is_left_alone(llm: ConServeChat, turns: TurnCollector) -> None:
    name = _name()
    llm.invoke(
        QUESTION, {"configurable": {"thread_id": "thread"}}, extra_headers={"x-conserve-conversation": name, "X-A": "b"}
    )
    assert _seen(turns) == [name]


def test_call_argument_replaces_such_a_header(llm: ConServeChat, turns: TurnCollector) -> None:
    name = _name()
    llm.invoke(QUESTION, extra_headers={"x-conserve-conversation": "header"}, conversation_id=name)
    assert _seen(turns) == [name]


def test_models_own_conversation(llm: ConServeChat, turns: TurnCollector) -> None:
    name = _name()
    own = ConServeChat(model=llm.model_name, conserve=llm.conserve, conversation_id=name)
    own.invoke(QUESTION, {"configurable": {"thread_id": "thread"}})
    assert _seen(turns) == [name]


def test_block_wins_over_the_thread_and_keeps_its_lineage(llm: ConServeChat, turns: TurnCollector) -> None:
    name = _name()
    with conversation(name, lineage="planner"):
        llm.invoke(QUESTION, {"configurable": {"thread_id": "thread"}})
    assert [(r.conversation_id, r.lineage) for r in turns.records] == [(name, "planner")]


def test_thread_ids_that_no_header_can_hold_are_hashed(llm: ConServeChat, turns: TurnCollector) -> None:
    llm.invoke(QUESTION, {"configurable": {"thread_id": "Ärger mit Rechnung 7"}})
    llm.invoke(QUESTION, {"configurable": {"thread_id": "Ärger mit Rechnung 7"}})
    (one, two) = _seen(turns)
    assert one == two
    assert one.startswith("h-")


def test_without_any_name_the_content_decides(llm: ConServeChat, turns: TurnCollector) -> None:
    question = [("user", f"Question {_name()}")]
    answer = llm.invoke(question)
    llm.invoke([*question, answer, ("user", "And then?")])
    one, two = turns.records
    assert one.conversation_id == two.conversation_id
    assert (one.turn, two.turn) == (1, 2)


def test_batch_gives_each_config_its_own_conversation(llm: ConServeChat, turns: TurnCollector) -> None:
    names = [_name() for _ in range(3)]
    llm.batch([QUESTION] * 3, [{"configurable": {"thread_id": name}} for name in names])
    assert sorted(_seen(turns)) == sorted(names)


def test_node_finds_the_thread_without_being_given_it(llm: ConServeChat, turns: TurnCollector) -> None:
    """A node that forgets to pass its config on still runs in LangGraph's context."""
    name = _name()

    def forgetful(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("agent", forgetful)
    builder.add_edge(START, "agent")
    builder.compile().invoke({"messages": QUESTION}, {"configurable": {"thread_id": name}})
    assert _seen(turns) == [name]


def test_two_agents_of_one_thread_have_a_lineage_each(llm: ConServeChat, turns: TurnCollector) -> None:
    name = _name()

    def both(state: MessagesState) -> dict[str, Any]:
        del state
        long = "Plan the work. " * 200
        llm.invoke([("system", "You plan. " + long), *QUESTION])
        return {"messages": [llm.invoke([("system", "You check. " + long), *QUESTION])]}

    builder = StateGraph(MessagesState)
    builder.add_node("agent", both)
    builder.add_edge(START, "agent")
    builder.compile().invoke({"messages": QUESTION}, {"configurable": {"thread_id": name}})
    assert _seen(turns) == [name, name]
    assert len({record.lineage for record in turns.records}) == 2


@pytest.mark.filterwarnings("ignore:.*is in beta")
async def test_events_v3_which_bypass_invoke_and_stream(llm: ConServeChat, turns: TurnCollector) -> None:
    async with llm.conserve:
        name = _name()

        async def node(state: MessagesState) -> dict[str, Any]:
            stream = await llm.astream_events(state["messages"], version="v3")
            return {"messages": [await stream]}

        builder = StateGraph(MessagesState)
        builder.add_node("agent", node)
        builder.add_edge(START, "agent")
        state = await builder.compile().ainvoke({"messages": QUESTION}, {"configurable": {"thread_id": name}})
        assert state["messages"][-1].text
        assert _seen(turns) == [name]


# ---- where contexts are lost, kept and shared -----------------------------------------------------------------


def _graph(node: Any) -> Any:
    builder = StateGraph(MessagesState)
    builder.add_node("agent", node)
    builder.add_edge(START, "agent")
    return builder.compile()


@pytest.mark.parametrize("config_given", [False, True])
def test_an_executor_inside_a_node_keeps_the_thread_only_by_config(
    llm: ConServeChat, turns: TurnCollector, config_given: bool
) -> None:
    """Executors start without the caller's context: pass the node's config on, or the content decides."""
    name, question = _name(), [("user", f"A question of its own: {uuid4().hex}. " * 40)]

    def node(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
        with ThreadPoolExecutor(1) as executor:
            work = executor.submit(llm.invoke, question, config if config_given else None)
        return {"messages": [work.result()]}

    _graph(node).invoke({"messages": QUESTION}, {"configurable": {"thread_id": name}})
    (record,) = turns.records
    assert (record.conversation_id == name) == config_given
    assert record.lease_id


async def test_to_thread_keeps_the_thread(llm: ConServeChat, turns: TurnCollector) -> None:
    name = _name()

    async def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await asyncio.to_thread(llm.invoke, state["messages"])]}

    async with llm.conserve:
        await _graph(node).ainvoke({"messages": QUESTION}, {"configurable": {"thread_id": name}})
        assert _seen(turns) == [name]


def test_batch_inside_a_node_keeps_the_thread(llm: ConServeChat, turns: TurnCollector) -> None:
    name = _name()

    def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": llm.batch([[("user", f"Part {number} of the work. " * 60)] for number in range(3)])}

    _graph(node).invoke({"messages": QUESTION}, {"configurable": {"thread_id": name}})
    assert _seen(turns) == [name] * 3
    assert len({record.lineage for record in turns.records}) == 3


async def test_async_batch_gives_each_config_its_own_conversation(llm: ConServeChat, turns: TurnCollector) -> None:
    async with llm.conserve:
        names = [_name() for _ in range(3)]
        configs: list[Any] = [{"configurable": {"thread_id": name}} for name in names]
        await llm.abatch([QUESTION] * 3, configs)
        assert sorted(_seen(turns)) == sorted(names)


def test_own_key_names_the_conversation_of_a_whole_graph(llm: ConServeChat, turns: TurnCollector) -> None:
    """A thread may be one of several that make up a conversation of the application."""
    name = _name()
    config: Any = {"configurable": {"thread_id": _name(), "conserve_conversation_id": name}}
    _graph(llm).invoke({"messages": QUESTION}, config)
    assert _seen(turns) == [name]


def test_graph_without_thread_is_told_by_content(llm: ConServeChat, turns: TurnCollector) -> None:
    graph = _graph(llm)
    question = {"messages": [("user", f"Question {_name()}. " * 60)]}
    state = graph.invoke(question)
    graph.invoke({"messages": [*state["messages"], ("user", "And then?")]})
    one, two = turns.records
    assert (one.conversation_id, one.lease_id) == (two.conversation_id, two.lease_id)


async def test_many_threads_at_once_do_not_mix(llm: ConServeChat, turns: TurnCollector) -> None:
    """Interleaved over tasks, threads and streams; each conversation is named by what it asks."""

    async def one(number: int, name: str) -> None:
        config: Any = {"configurable": {"thread_id": name}}
        asked = {"messages": [("user", f"I am {name}. " * 40)]}
        match number % 3:
            case 0:
                await graph.ainvoke(asked, config)
            case 1:
                await asyncio.to_thread(graph.invoke, asked, config)
            case _:
                async for _ in graph.astream(asked, config, stream_mode="messages"):
                    pass

    async with llm.conserve:
        graph, names = _graph(llm), [_name() for _ in range(30)]
        await asyncio.gather(*(one(number, name) for number, name in enumerate(names)))
        assert sorted(_seen(turns)) == sorted(names)
        assert len({record.lineage for record in turns.records}) == len(names)
        assert len({record.lease_id for record in turns.records}) == len(names)

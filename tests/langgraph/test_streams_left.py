"""A graph's stream that is left, by closing or by cancelling, ends at the engine, wherever in a burst of chunks it was.

A burst is the hard case: the next chunk is there already when the cancellation comes, and whoever waits for chunks by
`asyncio.wait_for` on Python 3.11 then loses the cancellation.
"""

import asyncio
from collections.abc import Iterator

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from conserve_langgraph import ConServeChat
from conserve_sdk import BASE_URL, ConServe
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.telemetry import TurnCollector
from conserve_sdk.testing import InMemoryBroker
from tests.support.loopback import MODEL, LoopbackEngine, aeventually, specs

QUESTION = [HumanMessage("What is a lease? " * 40)]
CHUNKS = (1, 2, 3, 5, 8, 13)


@pytest.fixture
def engine() -> Iterator[LoopbackEngine]:
    engine = LoopbackEngine(then="burst")
    yield engine
    engine.close()


@pytest.fixture
def before(engine: LoopbackEngine, turns: TurnCollector) -> Iterator[ConServe]:
    """A `ConServe` object before one engine that bursts and then holds still."""
    broker = InMemoryBroker(specs(("d0", engine)), settings=BrokerSettings(placement=PAPER))
    with ConServe(broker.url, broker_transport=broker, on_turn=turns) as conserve:
        yield conserve


def graph_of(model: BaseChatModel):
    async def agent(state: MessagesState, config: RunnableConfig) -> dict:
        return {"messages": [await model.ainvoke(state["messages"], config)]}

    builder = StateGraph(MessagesState)
    builder.add_node("agent", model if isinstance(model, ConServeChat) else agent)
    builder.add_edge(START, "agent")
    return builder.compile()


async def leave(graph, way: str, *, after: int) -> None:
    """Read so many chunks, then leave; returns when the graph has."""
    there = asyncio.Event()

    async def read() -> None:
        stream, seen = graph.astream({"messages": QUESTION}, stream_mode="messages"), 0
        async for _ in stream:
            seen += 1
            if seen == after:
                there.set()
                if way == "closed":
                    break
        await stream.aclose()

    reader = asyncio.create_task(read())
    await there.wait()
    if way == "cancelled":
        reader.cancel()
    await asyncio.wait([reader])
    assert reader.cancelled() == (way == "cancelled")


@pytest.mark.parametrize("way", ["closed", "cancelled"])
async def test_a_graph_stream_that_is_left_is_aborted(engine, before, turns, way) -> None:
    async with before as conserve:
        graph = graph_of(ConServeChat(model=MODEL, conserve=conserve))
        for number, after in enumerate(CHUNKS, start=1):
            await leave(graph, way, after=after)
            await aeventually(lambda seen=number: engine.aborted == seen, "the engine sees the abort")
    assert [record.error for record in turns.records] == ["client_cancelled"] * len(CHUNKS)
    assert len({record.lease_id for record in turns.records}) == 1


@pytest.mark.parametrize("way", ["closed", "cancelled"])
async def test_a_chat_openai_of_ones_own_without_a_chunk_timeout(engine, before, way) -> None:
    """What the documents advise to those who keep their own `ChatOpenAI` on Python 3.11."""
    async with before as conserve:
        model = ChatOpenAI(
            model=MODEL,
            base_url=BASE_URL,
            api_key="EMPTY",
            http_async_client=conserve.async_http_client(),
            stream_chunk_timeout=None,
        )
        await leave(graph_of(model), way, after=3)
        await aeventually(lambda: engine.aborted == 1, "the engine sees the abort")


def test_the_chunk_timeout_is_the_users_if_they_want_one(before, monkeypatch) -> None:
    assert ConServeChat(model=MODEL, conserve=before, stream_chunk_timeout=7.0).stream_chunk_timeout == 7.0
    monkeypatch.setenv("LANGCHAIN_OPENAI_STREAM_CHUNK_TIMEOUT_S", "8")
    assert ConServeChat(model=MODEL, conserve=before).stream_chunk_timeout == 8.0

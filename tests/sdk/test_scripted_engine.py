"""The scripted engine as tests of agents use it: all three APIs, tools, failures, time, and honest complaints."""

import asyncio
import json

import openai
import pytest

from conserve_sdk import ConServe
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import (
    EngineReply,
    FakeClock,
    InMemoryBroker,
    NetworkDenied,
    ScriptedEngine,
    ToolCall,
    UnexpectedCall,
    deny_network,
)

LONG = [{"role": "user", "content": "hello " * 400}]


@pytest.fixture
def talk():
    """Make a client whose conversations are played by an engine; every first turn migrates."""
    made = []

    def make(engine, **options) -> openai.OpenAI:
        broker = InMemoryBroker(settings=BrokerSettings(placement=PAPER))
        made.append(ConServe(broker.url, broker_transport=broker, engine_transport=engine, **options))
        return made[-1].openai_client()  # retries as openai's clients do by default

    yield make
    for conserve in made:
        conserve.close()


def ask(client, **options):
    return client.chat.completions.create(model="test-model", messages=LONG, **options)


def test_prefills_answer_themselves(talk) -> None:
    engine = ScriptedEngine(EngineReply.chat("one"), EngineReply.chat("two"), prefills="answer")
    client = talk(engine)
    assert [ask(client).choices[0].message.content for _ in range(2)] == ["one", "two"]
    engine.assert_complete()
    assert [call.is_prefill for call in engine.calls] == [True, False, False]
    assert len(engine.turns) == 2
    assert engine.calls_to("p0") == engine.calls[:1]


def test_replies_of_one_engine_go_first(talk) -> None:
    engine = ScriptedEngine(prefills="answer").add(EngineReply.chat("common"))
    client = talk(engine.script("d0", EngineReply.chat("d0's own")))
    assert ask(client).choices[0].message.content == "d0's own"
    assert ask(client).choices[0].message.content == "common"


def test_a_reply_may_be_made_of_the_call(talk) -> None:
    engine = ScriptedEngine(lambda call: EngineReply.chat(f"{call.engine}: {len(call.messages)}"), prefills="answer")
    assert ask(talk(engine)).choices[0].message.content == "d0: 1"


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(talk, stream) -> None:
    calls = [ToolCall("add", {"a": 2}), ToolCall("look", '{"broken', id="mine")]
    reply = EngineReply.chat_stream(tool_calls=calls) if stream else EngineReply.chat(tool_calls=calls)
    tools = [{"type": "function", "function": {"name": name}} for name in ("add", "look")]
    engine = ScriptedEngine(reply, prefills="answer")
    answer = ask(talk(engine), tools=tools, stream=stream)
    if stream:
        chunks = list(answer)
        found = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()]
        assert chunks[-2].choices[0].finish_reason == "tool_calls"
    else:
        found = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls"
    assert [(call.id, call.function.name, call.function.arguments) for call in found] == [
        ("call-1", "add", '{"a": 2}'),
        ("mine", "look", '{"broken'),
    ]
    assert engine.turns[0].tool_names == ["add", "look"]


def test_the_other_two_apis_answer_like_vllm(talk) -> None:
    engine = ScriptedEngine(then="answer")
    client = talk(engine)
    prompt = LONG[0]["content"]
    assert client.completions.create(model="test-model", prompt=prompt).choices[0].text == "ok"
    pieces = client.completions.create(model="test-model", prompt=prompt + "!", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "ok"
    assert client.responses.create(model="test-model", input=prompt).output_text == "ok"
    events = list(client.responses.create(model="test-model", input=prompt + "?", stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 2,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[-1].response.output_text == "ok"
    assert {call.is_prefill for call in engine.calls} == {True, False}


def test_a_response_with_tools(talk) -> None:
    engine = ScriptedEngine(EngineReply.response(tool_calls=[ToolCall("add", {"a": 1})]), prefills="answer")
    tools = [{"type": "function", "name": "add", "parameters": {}}]
    (call,) = talk(engine).responses.create(model="test-model", input="x" * 2000, tools=tools).output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "add", {"a": 1})
    assert engine.turns[0].tool_names == ["add"]


def test_an_unexpected_call_is_told_at_once_and_not_retried(talk) -> None:
    engine = ScriptedEngine(prefills="answer")
    client = talk(engine)
    with pytest.raises(UnexpectedCall, match="no reply scripted for POST /v1/chat/completions on d0"):
        ask(client)
    assert len(engine.turns) == 1
    with pytest.raises(AssertionError, match="nobody scripted a reply for: POST /v1/chat/completions on d0"):
        engine.assert_complete()


def test_a_denied_connection_is_told_at_once_through_a_client() -> None:
    with ConServe("http://127.0.0.1:9") as conserve, deny_network() as denied:
        with pytest.raises(NetworkDenied, match=r"something connects to \('127.0.0.1', 9\)"):
            ask(conserve.openai_client())
        assert denied == [("127.0.0.1", 9)]


@pytest.mark.parametrize(("scheme", "raised"), [("http", NetworkDenied), ("https", ExceptionGroup)])
def test_a_denied_connection_leaves_a_trace_where_it_is_swallowed(scheme, raised) -> None:
    async def main() -> None:
        async with ConServe(f"{scheme}://127.0.0.1:9") as conserve:
            client = conserve.async_openai_client(max_retries=0)
            with pytest.raises(raised):
                await client.chat.completions.create(model="m", messages=LONG)

    with deny_network() as denied:
        asyncio.run(main())
    assert ("127.0.0.1", 9) in denied


def test_a_stream_that_breaks_off(talk) -> None:
    reply = EngineReply.chat_stream("a", "b", "c").dropped(after=2)
    stream = ask(talk(ScriptedEngine(reply, prefills="answer")), stream=True)
    heard = []
    with pytest.raises(openai.APIConnectionError):
        heard.extend(chunk.choices[0].delta.content for chunk in stream)
    assert heard == ["", "a"]
    whole = EngineReply.chat_stream("a").dropped()
    assert len(whole.chunks) == len(EngineReply.chat_stream("a").chunks)
    assert len(reply.chunks) == 2


def test_time_passes_on_the_clock_only() -> None:
    clock = FakeClock(start_ms=1_000)
    engine = ScriptedEngine(EngineReply.failure(400).taking(40), clock=clock)
    broker = InMemoryBroker(clock=clock)
    with (
        ConServe(broker.url, broker_transport=broker, engine_transport=engine, clock_us=clock.monotonic_us) as conserve,
        pytest.raises(openai.OpenAIError),
    ):
        conserve.openai_client(max_retries=0).chat.completions.create(
            model="test-model", messages=[{"role": "user", "content": "x"}]
        )
    assert clock.monotonic_us() == 1_040_000


def test_a_reply_that_takes_time_needs_a_clock(talk) -> None:
    with pytest.raises(AssertionError, match=r"needs ScriptedEngine\(clock=...\)"):
        ask(talk(ScriptedEngine(EngineReply.chat().taking(1), prefills="answer")))

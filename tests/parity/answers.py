"""Scenes in which all goes well: every way to ask, every way to name the conversation."""

from __future__ import annotations

from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from conserve_sdk import BASE_URL, async_openai_client, connect, conversation, openai_client
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine, ToolCall, small_fleet
from tests.parity.program import Program
from tests.parity.scenes import scene
from tests.support.dialogue import LONG, follow_up

CHAT = "chat.completions"


class Verdict(BaseModel):
    tidy: bool


def says(*replies: EngineReply, **options):
    """Engines that play these replies, then answer like vLLM."""
    return lambda: {"engine": ScriptedEngine(*replies, then="answer", prefills="answer"), **options}


# ---- chat -----------------------------------------------------------------------------------------------------


@scene()
async def a_conversation_of_three_turns(p: Program) -> None:
    for turn in range(3):
        await p.ask(turn)
    assert p.engines_called == ["p0", "d0", "d0", "d0"]
    assert [record.migrated for record in p.turns.records] == [True, False, False]


@scene()
async def a_streamed_conversation(p: Program) -> None:
    for turn in range(3):
        await p.ask(turn, stream=True, stream_options={"include_usage": True})
    assert p.engines_called == ["p0", "d0", "d0", "d0"]
    assert all(record.streamed for record in p.turns.records)


@scene()
async def raw_responses(p: Program) -> None:
    with conversation("c1"):
        raw = await p.call(f"{CHAT}.with_raw_response.create", messages=follow_up(0))
        assert raw.headers["x-conserve-decoder"] == "d0"
        assert raw.http_request.url.host == "conserve.invalid"
        assert isinstance(raw.parse(), ChatCompletion)
        raw = await p.call(f"{CHAT}.with_raw_response.create", messages=follow_up(1), stream=True)
        items = await p.each(raw.parse())
    p.seen.append([item.model_dump(mode="json") for item in items])


@scene()
async def streaming_responses(p: Program) -> None:
    async def lines(raw) -> list[str]:
        return [raw.headers["x-conserve-decoder"], *await p.each(raw.iter_lines())]

    async def parsed(raw) -> object:
        return await p.value(raw.parse())

    path = f"{CHAT}.with_streaming_response.create"
    with conversation("c1"):
        found = await p.within(path, lines, messages=follow_up(0), stream=True)
        assert found[0] == "d0"
        assert "data: [DONE]" in found
        assert isinstance(await p.within(path, parsed, messages=follow_up(1)), ChatCompletion)


@scene()
async def the_stream_helper(p: Program) -> None:
    async def events(stream) -> list[str]:
        return [event.type for event in await p.each(stream)]

    async def final(stream) -> object:
        return await p.value(stream.get_final_completion())

    with conversation("c1"):
        assert "content.delta" in await p.within(f"{CHAT}.stream", events, messages=follow_up(0))
        answer = await p.within(f"{CHAT}.stream", final, messages=follow_up(1))
    assert answer.choices[0].message.content == "ok"


@scene(says(EngineReply.chat('{"tidy": true}')))
async def a_parsed_answer(p: Program) -> None:
    with conversation("c1"):
        answer = await p.call(f"{CHAT}.parse", messages=follow_up(0), response_format=Verdict)
    assert answer.choices[0].message.parsed.tidy


@scene(says(EngineReply.chat(tool_calls=[ToolCall("look", {"name": "a"})]), EngineReply.chat("done")))
async def a_tool_loop(p: Program) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    messages = follow_up(0)
    with conversation("c1"):
        answer = await p.call(f"{CHAT}.create", messages=messages, tools=[tool])
        messages += [
            answer.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": "call-1", "content": "3"},
        ]
        await p.call(f"{CHAT}.create", messages=messages, tools=[tool])
    assert [record.ttfet_ms is None for record in p.turns.records] == [True, False]


@scene()
async def several_choices(p: Program) -> None:
    await p.ask(n=2)
    assert "kv_transfer_params" not in p.engine.calls[0].body
    assert p.turns.records[0].loss == "several_choices"
    await p.ask(1)
    assert p.engines_called == ["d0", "d0"]


@scene(lambda: {"broker": InMemoryBroker(small_fleet(prefillers=0), settings=BrokerSettings(placement=PAPER))})
async def a_fleet_without_prefillers(p: Program) -> None:
    await p.ask(0)
    await p.ask(1)
    assert p.engines_called == ["d0", "d0"]


# ---- the other routes -----------------------------------------------------------------------------------------


@scene()
async def completions(p: Program) -> None:
    with conversation("c1"):
        await p.call("completions.create", prompt=LONG)
        await p.read("completions.create", prompt=LONG + "more", stream=True)
        await p.call("completions.with_raw_response.create", prompt=LONG + "more and more")
    assert [record.path for record in p.turns.records] == ["/v1/completions"] * 3
    assert p.engines_called[:2] == ["p0", "d0"]


@scene()
async def responses(p: Program) -> None:
    said = [{"role": "user", "content": LONG}]
    with conversation("c1"):
        answer = await p.call("responses.create", input=said)
        said += [{"role": "assistant", "content": answer.output_text}, {"role": "user", "content": "more"}]
        await p.read("responses.create", input=said, stream=True)
        await p.call("responses.with_raw_response.create", input=[*said, {"role": "user", "content": "now"}])
    assert p.engines_called == ["p0", "d0", "d0", "d0"]


@scene()
async def the_stream_helper_of_responses(p: Program) -> None:
    async def final(stream) -> object:
        return (await p.value(stream.get_final_response())).output_text

    with conversation("c1"):
        assert await p.within("responses.stream", final, input=LONG) == "ok"


@scene(says(EngineReply.response('{"tidy": false}')))
async def a_parsed_response(p: Program) -> None:
    with conversation("c1"):
        assert not (await p.call("responses.parse", input=LONG, text_format=Verdict)).output_parsed.tidy


@scene()
async def a_response_that_names_its_predecessor(p: Program) -> None:
    first = await p.call("responses.create", input=LONG)
    await p.call("responses.create", input="go on", previous_response_id=first.id)
    assert len({(record.conversation_id, record.lineage) for record in p.turns.records}) == 1
    assert p.engines_called == ["p0", "d0", "d0"]


@scene()
async def requests_that_are_no_turns(p: Program) -> None:
    assert (await p.get("/models"))[0] == 200
    await p.call("embeddings.create", input="hello")
    await p.ask()
    assert (await p.get("/models?limit=3"))[0] == 200
    assert len(p.turns.records) == 1


# ---- clients --------------------------------------------------------------------------------------------------


@scene()
async def clients_of_the_package(p: Program) -> None:
    make = async_openai_client if p.colour == "async" else openai_client
    client = make(p.broker.url, max_retries=0)
    with conversation("c1"):
        await p.call(f"{CHAT}.create", client=client, messages=follow_up(0))
        await p.call(f"{CHAT}.create", client=client.with_options(timeout=7.0), messages=follow_up(1))
    assert connect(p.broker.url) is p.conserve
    assert p.engines_called == ["p0", "d0", "d0"]
    await p.value(client.close())
    await p.ask(2)


@scene()
async def http_clients_and_transports_in_ones_own(p: Program) -> None:
    import httpx2

    kind = httpx2.AsyncClient if p.colour == "async" else httpx2.Client
    body = {"model": "test-model", "messages": follow_up(0)}
    for client in (p.twin("http_client")(), kind(transport=p.twin("transport")(), base_url=BASE_URL)):
        answer = await p.value(client.post("/chat/completions", json=body))
        p.seen.append([answer.status_code, answer.text, answer.headers["x-conserve-turn"]])
        await p.value(client.aclose() if p.colour == "async" else client.close())
    assert p.engines_called == ["p0", "d0", "d0"]


@scene()
async def an_http_client_of_ones_own_is_refused(p: Program) -> None:
    error = await p.attempt(lambda: p.value(p.twin("openai_client")(http_client=None)))
    assert type(error).__name__ == "ConfigError"


# ---- which conversation ---------------------------------------------------------------------------------------


@scene()
async def names_given_by_the_request(p: Program) -> None:
    for options in (
        {"extra_headers": {"X-ConServe-Conversation": "header"}},
        {"extra_headers": {"X-Session-ID": "session"}},
        {"prompt_cache_key": "key"},
        {"extra_headers": {"X-ConServe-Conversation": "header", "X-ConServe-Lineage": "planner"}},
    ):
        await p.call(f"{CHAT}.create", messages=follow_up(0), **options)
    assert [record.conversation_id for record in p.turns.records] == ["header", "session", "key", "header"]
    assert p.turns.records[-1].lineage == "planner"


@scene()
async def blocks(p: Program) -> None:
    async with p.inside(conversation("outer")) as outer:
        await p.call(f"{CHAT}.create", messages=follow_up(0))
        async with p.inside(conversation("inner", lineage="worker")):
            await p.call(f"{CHAT}.create", messages=follow_up(0))
        await p.call(f"{CHAT}.create", messages=follow_up(1))
        p.seen.append(str(outer.stats()))
    p.seen.append(str(p.conserve.stats("outer")))
    assert [record.conversation_id for record in p.turns.records] == ["outer", "inner", "outer"]
    assert outer.stats().turns == 2


@scene()
async def wrapped_functions(p: Program) -> None:
    def blocking():
        return p.client.chat.completions.create(model="test-model", messages=follow_up(0))

    async def looped():
        return await p.client.chat.completions.create(model="test-model", messages=follow_up(0))

    function = looped if p.colour == "async" else blocking
    await p.attempt(lambda: p.value(conversation("wrapped").wrap(function)()))
    assert p.turns.records[0].conversation_id == "wrapped"


@scene()
async def without_a_name_the_content_tells(p: Program) -> None:
    for turn in range(2):
        await p.call(f"{CHAT}.create", messages=follow_up(turn))
    assert len({record.lease_id for record in p.turns.records}) == 1
    assert p.turns.records[0].conversation_id.startswith("anon-")


@scene()
async def sub_agents_and_tiny_strangers(p: Program) -> None:
    await p.ask(0)
    await p.ask(messages=[{"role": "system", "content": "Give a title."}])
    worker = [{"role": "system", "content": "You are a worker. " * 100}, {"role": "user", "content": "Work."}]
    await p.ask(messages=worker)
    await p.ask(1)
    lineages = [record.lineage for record in p.turns.records]
    assert lineages[0] == lineages[3]
    assert len(set(lineages)) == 3
    assert [record.lease_id is None for record in p.turns.records] == [False, True, False, False]


@scene()
async def an_empty_name_is_refused(p: Program) -> None:
    async def name() -> None:
        conversation("")

    assert type(await p.attempt(name)).__name__ == "ConfigError"

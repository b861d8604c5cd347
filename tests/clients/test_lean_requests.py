"""Clients of `ConServe` send what openai's own would, byte for byte, without its walk through plain messages."""

from __future__ import annotations

import asyncio
import enum
import functools
import json
from collections.abc import Callable
from datetime import date
from typing import Any, get_args

import httpx2
import openai
import pytest
import typing_extensions
from hypothesis import given
from hypothesis import strategies as st
from openai.resources.chat import Completions
from openai.resources.chat import completions as chat_module
from openai.types.chat import ChatCompletionMessage, completion_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel

from conserve_openai_agents import ConServeModel
from conserve_pydantic_ai import ConServeProvider
from conserve_sdk import ConServe
from conserve_sdk._lean import AsyncOpenAI, OpenAI
from conserve_sdk._lean.chat import AsyncLeanCompletions, LeanCompletions
from conserve_sdk._lean.plain import moved

ANSWER = {
    "id": "a",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}],
}
RESPONSE = {"id": "r", "object": "response", "created_at": 1, "model": "m", "output": [], "tools": []}


class Mood(enum.StrEnum):
    CALM = "calm"


class Note(BaseModel):
    text: str = "?"
    more: list[int] = []


class Sent:
    """What a client of a kind puts on the wire."""

    def __init__(
        self, kind: type[Any], *, statuses: tuple[int, ...] = (), meanwhile: Callable[[], object] = int
    ) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[httpx2.Headers] = []
        self._statuses, self._meanwhile = list(statuses), meanwhile
        self._is_async = issubclass(kind, openai.AsyncOpenAI)
        http: Any = httpx2.AsyncClient if self._is_async else httpx2.Client
        transport = httpx2.MockTransport(self._answer)
        self.client = kind(api_key="k", base_url="http://engine/v1", http_client=http(transport=transport))

    def call(self, make: Callable[[Any], Any]) -> Any:
        """What the call returns."""

        async def awaited() -> Any:
            return await make(self.client)

        return asyncio.run(awaited()) if self._is_async else make(self.client)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.bodies.append(request.content)
        self.headers.append(request.headers)
        self._meanwhile()
        status = self._statuses.pop(0) if self._statuses else 200
        headers = {"retry-after-ms": "1"}
        return httpx2.Response(status, headers=headers, json=RESPONSE if "responses" in request.url.path else ANSWER)


PAIRS = pytest.mark.parametrize(
    ("kind", "reference"),
    [(OpenAI, openai.OpenAI), (AsyncOpenAI, openai.AsyncOpenAI)],
    ids=["blocking", "async"],
)


def both(kind: type[Any], reference: type[Any], make: Callable[[Any], Any]) -> tuple[object, object]:
    """What both put on the wire, or how both failed."""
    found: list[object] = []
    for each in (kind, reference):
        sent = Sent(each)
        try:
            sent.call(make)
            found.append(sent.bodies)
        except Exception as error:
            found.append((type(error), str(error)))
    return found[0], found[1]


leaves: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
odd: st.SearchStrategy[Any] = st.sampled_from(
    [Mood.CALM, Note(text="x"), date(2026, 1, 2), (1, 2), openai.omit, openai.not_given, {1: 2}, b"raw", {3}]
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)
names = (
    st.sampled_from(["role", "content", "tool_calls", "name", "type", "function", "text", "tool_call_id"]) | st.text()
)
contents = values | st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": values}), max_size=2
)


def messages(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Lists of messages, sound and otherwise."""
    one = st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "function"])},
        optional={"content": contents | inner, "tool_calls": inner, "tool_call_id": inner, "name": inner},
    )
    answered = st.builds(
        ChatCompletionMessage, role=st.just("assistant"), content=st.none() | st.text(), refusal=st.none()
    )
    return st.lists(one | answered | st.dictionaries(names, inner, max_size=3), max_size=4)


@PAIRS
@given(data=st.data())
def test_chat_messages_arrive_as_openai_would_send_them(kind: Any, reference: Any, data: st.DataObject) -> None:
    fields = {
        "messages": data.draw(messages(values) | messages(values | odd)),
        "tools": data.draw(st.lists(st.dictionaries(names, values, max_size=3), max_size=2) | st.just(openai.omit)),
        "extra_body": data.draw(st.none() | st.dictionaries(st.sampled_from(["messages", "top_k"]), values)),
    }
    ours, openais = both(kind, reference, lambda c: c.chat.completions.create(model="m", max_tokens=3, **fields))
    assert ours == openais


@PAIRS
@given(data=st.data())
def test_input_of_responses_arrives_as_openai_would_send_it(kind: Any, reference: Any, data: st.DataObject) -> None:
    given_input = data.draw(st.text() | messages(values) | messages(values | odd))
    ours, openais = both(kind, reference, lambda c: c.responses.create(model="m", input=given_input))
    assert ours == openais


@PAIRS
def test_every_way_to_ask_sends_the_same(kind: Any, reference: Any) -> None:
    fields: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    tool = openai.pydantic_function_tool(Note)
    for make in (
        lambda c: c.chat.completions.create(**fields),
        lambda c: c.chat.completions.with_raw_response.create(**fields),
        lambda c: c.with_options(timeout=3).chat.completions.create(**fields),
        lambda c: c.with_raw_response.chat.completions.create(**fields, tools=[tool]),
        lambda c: c.chat.completions.parse(**fields, tools=[tool]),
        lambda c: c.responses.with_raw_response.create(model="m", input=fields["messages"]),
        lambda c: c.chat.completions.create(model="m", messages=iter(fields["messages"])),
        lambda c: c.chat.completions.create(model="m", messages=tuple(fields["messages"])),
        lambda c: c.chat.completions.create(messages=fields["messages"]),  # no model: openai's complaint
        lambda c: c.chat.completions.create(**fields, nonsense=1),
    ):
        ours, openais = both(kind, reference, make)
        assert ours == openais


def test_every_client_of_the_sdk_is_one() -> None:
    with ConServe("http://127.0.0.1:9") as conserve:
        assert type(conserve.openai_client()) is OpenAI
        assert type(conserve.async_openai_client()) is AsyncOpenAI
        assert type(ConServeModel("m", conserve=conserve)._client) is AsyncOpenAI
        assert type(ConServeProvider(conserve=conserve).client) is AsyncOpenAI


@PAIRS
@pytest.mark.parametrize("depth", [300, 600, 100_000])
def test_deep_values_fare_as_with_openai(kind: Any, reference: Any, depth: int) -> None:
    deep: list[Any] = []
    for _ in range(depth):
        deep = [deep]
    ours, openais = both(
        kind, reference, lambda c: c.chat.completions.create(model="m", messages=[{"role": "user", "content": deep}])
    )
    assert ours == openais


@PAIRS
def test_it_looks_like_an_openai_client(kind: Any, reference: Any) -> None:
    seen = []
    for each in (kind, reference):
        sent = Sent(each)
        sent.call(lambda c: c.chat.completions.create(model="m", messages=[]))
        seen.append(sent.headers[0]["user-agent"])
    assert seen[0] == seen[1]
    assert isinstance(Sent(kind).client.with_options(timeout=3), kind)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What openai's client walks through."""
    found: list[Any] = []
    module: Any = chat_module.completions

    def noted(data: Any, expected: object) -> Any:
        found.append(data)
        return _walk(data, expected)

    async def anoted(data: Any, expected: object) -> Any:
        found.append(data)
        return await _awalk(data, expected)

    _walk, _awalk = module.maybe_transform, module.async_maybe_transform
    monkeypatch.setattr(module, "maybe_transform", noted)
    monkeypatch.setattr(module, "async_maybe_transform", anoted)
    return found


@pytest.mark.parametrize("kind", [OpenAI, AsyncOpenAI])
def test_plain_messages_and_tools_are_not_walked_through(kind: Any, walked: list[Any]) -> None:
    sent = Sent(kind)
    answer = sent.call(lambda c: c.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}]))
    history = [{"role": "user", "content": "a"}, answer.choices[0].message, {"role": "user", "content": "b"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    sent.call(lambda c: c.chat.completions.create(model="m", messages=history, tools=[tool]))
    assert [each["messages"] for each in walked] == [(), ()]
    assert walked[1]["tools"] == ()
    assert [message["role"] for message in json.loads(sent.bodies[1])["messages"]] == ["user", "assistant", "user"]
    sent.call(lambda c: c.chat.completions.create(model="m", messages=[{"role": "user", "content": Mood.CALM}]))
    assert walked[2]["messages"] == [{"role": "user", "content": Mood.CALM}]


@pytest.mark.parametrize("kind", [OpenAI, AsyncOpenAI])
def test_a_retry_sends_what_was_asked_for(kind: Any) -> None:
    history: list[Any] = [{"role": "user", "content": ["a"]}]

    def meanwhile() -> None:
        history[0]["content"].append("b")
        history.append({"role": "user", "content": "c"})

    sent = Sent(kind, statuses=(500,), meanwhile=meanwhile)
    sent.call(lambda c: c.chat.completions.create(model="m", messages=history))
    assert len(sent.bodies) == 2
    assert sent.bodies[0] == sent.bodies[1]


def test_tracing_in_the_place_of_openais_method_sees_the_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    openais = Completions.create

    @functools.wraps(openais)
    def traced(self: Any, **params: Any) -> Any:
        seen.append(params["messages"])
        return openais(self, **params)

    monkeypatch.setattr(Completions, "create", traced)
    sent, message = Sent(OpenAI), {"role": "user", "content": "a"}
    sent.call(lambda c: c.chat.completions.create(model="m", messages=[message]))
    assert seen == [[message]]


def test_a_proxy_in_the_place_of_openais_method_is_not_taken_for_it() -> None:
    openais = Completions.create

    class Proxy:
        """As `wrapt` makes them: what is asked of it, the function answers."""

        __class__: Any = type(openais)
        __globals__ = openais.__globals__

    params = {"messages": [{"role": "user", "content": "a"}]}
    assert isinstance(Proxy(), type(openais))
    assert moved(params, Proxy(), "messages") is params
    assert moved(params, openais, "messages") is not params


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (completion_create_params.CompletionCreateParamsNonStreaming, "messages"),
        (completion_create_params.CompletionCreateParamsNonStreaming, "tools"),
        (response_create_params.ResponseCreateParamsNonStreaming, "input"),
        (response_create_params.ResponseCreateParamsNonStreaming, "tools"),
    ],
)
def test_openai_renames_and_reformats_nothing_in_messages(params: Any, field: str) -> None:
    """Should this fail, openai's walk changes plain JSON there: `field` must go openai's way again."""
    seen: set[int] = set()
    changed: list[tuple[str, object]] = []

    def look(annotation: Any, path: str) -> None:
        extras = getattr(annotation, "__metadata__", ())
        changed.extend((path, each) for each in extras if getattr(each, "alias", None) or getattr(each, "format", None))
        if id(annotation) in seen:
            return
        seen.add(id(annotation))
        for inner in get_args(annotation):
            look(inner, path)
        if typing_extensions.is_typeddict(annotation):
            hints = typing_extensions.get_type_hints(annotation, include_extras=True)
            for name, inner in hints.items():
                look(inner, f"{path}.{name}")

    look(typing_extensions.get_type_hints(params, include_extras=True)[field], field)
    assert len(seen) > 20
    assert changed == []


def test_both_colours_have_the_same_ways() -> None:
    ways = [
        {name for name in vars(kind) if not name.startswith("_")} for kind in (LeanCompletions, AsyncLeanCompletions)
    ]
    assert ways[0] == ways[1] == {"create", "parse"}

"""Clients of `ConServe` give the answers that openai's own would give, without building plain ones field by field."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import _base_client
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from conserve_sdk import make_lean
from conserve_sdk._lean import AsyncOpenAI, OpenAI
from conserve_sdk._lean.answers import read

KINDS = pytest.mark.parametrize("kind", [OpenAI, AsyncOpenAI])

text = st.text(max_size=8)


def answers(odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Completions and chunks; `odd` stands where something else should."""
    function = st.fixed_dictionaries({"name": text, "arguments": text | odd})
    call = st.fixed_dictionaries(
        {"id": text | odd, "type": st.just("function") | odd, "function": function | odd},
        optional={"index": st.integers(0, 3) | odd},
    )
    custom = st.fixed_dictionaries(
        {"id": text, "type": st.just("custom"), "custom": st.fixed_dictionaries({"name": text, "input": text | odd})}
    )
    message = st.fixed_dictionaries(
        {"role": st.just("assistant") | odd, "content": st.none() | text | odd},
        optional={
            "refusal": st.none() | odd,
            "reasoning": text | odd,
            "tool_calls": st.lists(call | custom, max_size=2) | odd,
            "function_call": st.none() | function | odd,
        },
    )
    choice = st.fixed_dictionaries(
        {
            "index": st.integers(0, 2) | odd,
            "finish_reason": st.sampled_from(["stop", "tool_calls"]) | odd,
            "message": message | odd,
            "delta": message | odd,
        },
        optional={
            "logprobs": st.none() | st.fixed_dictionaries({"content": st.none() | odd, "refusal": st.none()}) | odd,
            "token_ids": st.none() | st.lists(st.integers(), max_size=2),
        },
    )
    usage = st.fixed_dictionaries(
        {"prompt_tokens": st.integers() | odd, "completion_tokens": st.integers(), "total_tokens": st.integers()},
        optional={"prompt_tokens_details": st.none() | st.fixed_dictionaries({"cached_tokens": st.integers() | odd})},
    )
    return st.fixed_dictionaries(
        {"id": text, "created": st.integers() | odd, "model": text, "choices": st.lists(choice, max_size=2)},
        optional={
            "usage": st.none() | usage | odd,
            "service_tier": st.sampled_from([None, "auto"]) | odd,
            "system_fingerprint": st.none() | text,
            "kv_transfer_params": st.none() | st.dictionaries(text, text, max_size=2) | odd,
        },
    )


sound = answers(st.nothing())
unsound = answers(st.sampled_from([None, 1, 1.5, "1", True, [], {}, {"a": [1]}, "stop", "abort"]))
MESSAGE: dict[str, Any] = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": []}
WHOLE = {
    "id": "a",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": MESSAGE, "logprobs": None, "stop_reason": None}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}
CHUNK = {
    "id": "a",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "delta": {"content": "yes"}, "logprobs": None, "finish_reason": None}],
}


def client(kind: type[Any], answer: httpx2.Response | None = None, **options: Any) -> Any:
    """A client whose every call is answered so."""
    http: Any = httpx2.AsyncClient if issubclass(kind, openai.AsyncOpenAI) else httpx2.Client
    transport = httpx2.MockTransport(lambda _: answer or httpx2.Response(200, json=WHOLE))
    return kind(api_key="k", base_url="http://engine/v1", http_client=http(transport=transport), **options)


def shown(value: Any) -> Any:
    """A model as it is built: equality of models forgives a wrong class inside."""
    if isinstance(value, BaseModel):
        known = value.model_fields_set & set(type(value).model_fields)  # of unknown ones openai has its own opinion
        return (type(value).__name__, {name: shown(each) for name, each in value}, sorted(known))
    if isinstance(value, list):
        return [shown(each) for each in value]
    if isinstance(value, dict):
        return {name: shown(each) for name, each in value.items()}
    return (type(value).__name__, value)


LEAN, OPENAIS = client(OpenAI), client(openai.OpenAI)
BOTH_FORMS = [(ChatCompletion, "chat.completion"), (ChatCompletionChunk, "chat.completion.chunk")]


@pytest.mark.parametrize(("cast_to", "name"), BOTH_FORMS)
@given(data=sound | unsound)
def test_answers_are_built_as_openai_builds_them(cast_to: Any, name: str, data: dict[str, Any]) -> None:
    data |= {"object": name}
    response = httpx2.Response(200)
    ours, openais = (
        each._process_response_data(data=data, cast_to=cast_to, response=response) for each in (LEAN, OPENAIS)
    )
    assert shown(ours) == shown(openais)
    for options in ({}, {"exclude_unset": True}, {"exclude_none": True}):
        assert ours.model_dump(**options, warnings=False) == openais.model_dump(**options, warnings=False)
    assert ours.to_dict(warnings=False) == openais.to_dict(warnings=False)


@pytest.mark.parametrize(("data", "cast_to"), [(WHOLE, ChatCompletion), (CHUNK, ChatCompletionChunk)])
def test_answers_of_the_right_form_are_read_at_once(data: Any, cast_to: Any) -> None:
    assert shown(read(data, cast_to)) == shown(
        OPENAIS._process_response_data(data=data, cast_to=cast_to, response=httpx2.Response(200))
    )


@pytest.mark.parametrize(
    ("data", "cast_to"),
    [
        (WHOLE | {"created": "1"}, ChatCompletion),
        (WHOLE, ChatCompletion | None),
        (WHOLE, dict),
        ([WHOLE], ChatCompletion),
        (CHUNK, type("ChatCompletionChunk", (BaseModel,), {})),
        (None, ChatCompletion),
    ],
)
def test_anything_else_is_openais(data: Any, cast_to: Any) -> None:
    assert read(data, cast_to) is None


@KINDS
def test_calls_and_streams_use_it(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should this fail, openai builds answers in another place: find it, and override that in `conserve_sdk._lean`."""

    def none_is_built(**_: object) -> None:
        raise AssertionError("built field by field")

    monkeypatch.setattr(_base_client, "construct_type", none_is_built)
    events = "".join(f"data: {json.dumps(each)}\n\n" for each in (CHUNK, CHUNK)) + "data: [DONE]\n\n"
    stream = httpx2.Response(200, text=events, headers={"content-type": "text/event-stream"})
    fields: dict[str, Any] = {"model": "m", "messages": []}

    async def awaited() -> tuple[Any, list[Any]]:
        whole = await client(kind).chat.completions.create(**fields)
        chunks = await client(kind, stream).chat.completions.create(**fields, stream=True)
        return whole, [each async for each in chunks]

    if kind is AsyncOpenAI:
        whole, chunks = asyncio.run(awaited())
    else:
        whole = client(kind).chat.completions.create(**fields)
        chunks = list(client(kind, stream).chat.completions.create(**fields, stream=True))
    assert whole.choices[0].message.content == "yes"
    assert [each.choices[0].delta.content for each in chunks] == ["yes", "yes"]
    raw = client(OpenAI).chat.completions.with_raw_response.create(**fields)
    assert raw.parse().usage.total_tokens == 4


@KINDS
def test_an_answer_that_is_no_completion_is_let_through_as_openai_does(kind: Any) -> None:
    answer = httpx2.Response(200, json={"choices": "none", "created": "soon"})

    async def awaited() -> Any:
        return await client(kind, answer).chat.completions.create(model="m", messages=[])

    found = asyncio.run(awaited()) if kind is AsyncOpenAI else client(kind, answer).chat.completions.create(
        model="m", messages=[]
    )  # fmt: skip
    assert (found.choices, found.created, found.model) == ("none", "soon", None)


@pytest.mark.parametrize(("kind", "lean"), [(openai.OpenAI, OpenAI), (openai.AsyncOpenAI, AsyncOpenAI)])
def test_a_client_made_elsewhere_is_made_lean_in_place(kind: Any, lean: Any) -> None:
    made = client(kind, timeout=7, max_retries=5)
    before = made.chat.completions, made.responses
    assert make_lean(made) is made
    assert type(made) is lean
    assert (made.timeout, made.max_retries) == (7, 5)
    assert type(made.chat.completions) is not type(before[0])
    assert type(made.responses) is not type(before[1])
    assert make_lean(made) is made  # and stays so


def test_clients_of_another_class_are_left_alone() -> None:
    azure = openai.AzureOpenAI(api_key="k", azure_endpoint="https://a", api_version="1")
    chat = azure.chat
    assert make_lean(azure).chat is chat
    assert type(azure) is openai.AzureOpenAI

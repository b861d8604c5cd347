"""Chat completions over HTTP, by plain requests and by the OpenAI client."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest

from conserve_lab.emulator import EmulatedFleet, default_fleet

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read_file",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}},
                "required": ["path"],
            },
        },
    }
]
USER = [{"role": "user", "content": "read the file `notes.txt`, 12 lines"}]


def post(fleet: EmulatedFleet, http: httpx2.Client, engine: str = "d0", **body: Any) -> httpx2.Response:
    path = body.pop("path", "/v1/chat/completions")
    body = {"model": "emulated", **body}
    return http.post(fleet.engine(engine).url + path, json=body)


def chunks(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_every_engine_gives_the_same_answer(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    answers = [
        post(shared_fleet, http, name, messages=USER, tools=TOOLS).json()["choices"] for name in ("p0", "d0", "d1")
    ]
    assert answers[0] == answers[1] == answers[2]
    call = answers[0][0]["message"]["tool_calls"][0]["function"]
    assert (call["name"], json.loads(call["arguments"])) == ("read_file", {"path": "notes.txt", "lines": 12})
    assert answers[0][0]["finish_reason"] == "tool_calls"
    assert answers[0][0]["message"]["content"] is None


def test_streamed_and_whole_answers_are_the_same(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hello ünïcödé"}], "temperature": 0}
    whole = post(shared_fleet, http, **body).json()
    parts = chunks(post(shared_fleet, http, **body, stream=True).text)
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == whole["choices"][0]["message"]["content"]
    assert [part["choices"][0]["finish_reason"] for part in parts][-1] == "stop"
    assert all("usage" not in part and "kv_transfer_params" not in part for part in parts)


def test_streamed_calls_begin_with_id_and_name(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    body = {"messages": USER, "tools": TOOLS}
    whole = post(shared_fleet, http, **body).json()["choices"][0]["message"]["tool_calls"][0]
    stream = post(shared_fleet, http, **body, stream=True, stream_options={"include_usage": True})
    parts = chunks(stream.text)
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] > 0
    calls = [call for part in parts[:-1] for call in part["choices"][0]["delta"].get("tool_calls", [])]
    assert calls[0]["id"] == whole["id"]
    assert calls[0]["function"] == {"name": "read_file", "arguments": ""}
    assert all("id" not in call and "name" not in call["function"] for call in calls[1:])
    assert "".join(call["function"]["arguments"] for call in calls) == whole["function"]["arguments"]
    assert parts[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_usage_in_every_chunk_on_demand(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    parts = chunks(post(shared_fleet, http, messages=USER, stream=True, stream_options=options).text)
    counts = [part["usage"]["completion_tokens"] for part in parts[1:]]
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2]


def test_a_second_turn_hits_the_prefix_cache(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    messages = [{"role": "system", "content": "word " * 100}, {"role": "user", "content": "hello"}]
    first = post(fleet, http, messages=messages).json()
    messages += [first["choices"][0]["message"], {"role": "user", "content": "and now?"}]
    second = post(fleet, http, messages=messages).json()
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    prompt = first["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_tokens_details"]["created_cache_tokens"] == prompt // 16 * 16
    # Everything but the last token of the answer was computed; only full blocks of 16 are found again.
    total = first["usage"]["total_tokens"] - 1
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == total // 16 * 16
    salted = post(fleet, http, messages=messages, cache_salt="mine").json()
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_token_ids_come_back_on_demand(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    whole = post(shared_fleet, http, messages=USER, return_token_ids=True).json()
    tokens = post(shared_fleet, http, messages=USER, path="/tokenize").json()
    assert whole["prompt_token_ids"] == tokens["tokens"]
    assert tokens["count"] == whole["usage"]["prompt_tokens"]
    parts = chunks(post(shared_fleet, http, messages=USER, return_token_ids=True, stream=True).text)
    assert parts[0]["prompt_token_ids"] == tokens["tokens"]
    streamed = [token for part in parts[1:] for token in part["choices"][0]["token_ids"]]
    assert streamed == whole["choices"][0]["token_ids"]


def test_several_choices_differ_and_the_first_is_the_single_one(
    shared_fleet: EmulatedFleet, http: httpx2.Client
) -> None:
    one = post(shared_fleet, http, messages=USER).json()
    three = post(shared_fleet, http, messages=USER, n=3).json()
    texts = [choice["message"]["content"] for choice in three["choices"]]
    assert texts[0] == one["choices"][0]["message"]["content"]
    assert len(set(texts)) == 3
    parts = chunks(post(shared_fleet, http, messages=USER, n=3, stream=True).text)
    for index, text in enumerate(texts):
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(item["delta"].get("content", "") for item in mine) == text
        assert mine[-1]["finish_reason"] == "stop"


def test_chunks_can_carry_several_tokens(http: httpx2.Client) -> None:
    with EmulatedFleet(default_fleet(prefillers=0, decoders=1, time_scale=0), stream_interval=8) as fleet:
        parts = chunks(post(fleet, http, messages=USER, stream=True, return_token_ids=True).text)
    sizes = [len(part["choices"][0]["token_ids"]) for part in parts[1:]]
    assert sizes[0] == 1
    assert set(sizes[1:-1]) == {8}
    assert sizes[-1] <= 8


def test_answers_bound_to_a_format(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    bound = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for extra in (
        {"response_format": bound},
        {"structured_outputs": {"json": schema}},
    ):
        text = post(shared_fleet, http, messages=USER, **extra).json()["choices"][0]["message"]["content"]
        assert json.loads(text) == {"n": 12}
    anything = post(shared_fleet, http, messages=USER, response_format={"type": "json_object"}).json()
    assert isinstance(json.loads(anything["choices"][0]["message"]["content"]), dict)
    chosen = post(shared_fleet, http, messages=USER, structured_outputs={"choice": ["a", "b"]}).json()
    assert chosen["choices"][0]["message"]["content"] in {"a", "b"}


@pytest.mark.parametrize(
    ("wanted", "keys"),
    [
        ("Answer as JSON with 'setup' and 'punchline' keys.", {"setup", "punchline"}),
        ('An object with "a", "b" and "c_1" fields, please', {"a", "b", "c_1"}),
        ("Give the `total` field", {"total"}),
        ("Any JSON will do", {"answer"}),
    ],
)
def test_an_open_json_object_has_the_keys_that_the_prompt_names(
    shared_fleet: EmulatedFleet, http: httpx2.Client, wanted: str, keys: set[str]
) -> None:
    messages = [{"role": "user", "content": wanted}]
    answer = post(shared_fleet, http, messages=messages, response_format={"type": "json_object"}).json()
    assert json.loads(answer["choices"][0]["message"]["content"]).keys() == keys


def test_limits_and_stop_words(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    both = post(shared_fleet, http, messages=USER, max_tokens=1, max_completion_tokens=3).json()
    assert (both["usage"]["completion_tokens"], both["choices"][0]["finish_reason"]) == (3, "length")
    long = post(shared_fleet, http, messages=USER, max_tokens=90, ignore_eos=True).json()
    assert long["usage"]["completion_tokens"] == 90
    word = long["choices"][0]["message"]["content"].split()[2]
    stopped = post(shared_fleet, http, messages=USER, max_tokens=90, ignore_eos=True, stop=word).json()
    assert stopped["choices"][0]["stop_reason"] == word


CONTENT_PARTS = [{"type": "text", "text": "read "}, "the file"]


def test_content_may_be_parts_and_options_enter_the_prompt(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    parts = post(shared_fleet, http, messages=[{"role": "user", "content": CONTENT_PARTS}], path="/tokenize").json()
    plain = post(shared_fleet, http, messages=[{"role": "user", "content": "read the file"}], path="/tokenize").json()
    assert parts["tokens"] == plain["tokens"]
    thinking = post(
        shared_fleet,
        http,
        messages=[{"role": "user", "content": "read the file"}],
        chat_template_kwargs={"enable_thinking": False},
        path="/tokenize",
    ).json()
    assert thinking["count"] > plain["count"]
    bare = post(shared_fleet, http, messages=USER, add_generation_prompt=False, path="/tokenize").json()
    assert bare["count"] == post(shared_fleet, http, messages=USER, path="/tokenize").json()["count"] - 1


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"messages": []}, 400, "messages", "non-empty list"),
        ({"messages": [{"role": "robot", "content": ""}]}, 400, "messages[0]", "needs a role"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0]", "string or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0]", "'image_url'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, "messages[0]", "function with a name"),
        ({"messages": USER, "model": "other"}, 404, "model", "The model `other` does not exist."),
        ({"messages": USER, "tools": [{"type": "function"}]}, 400, "tools", "function tools"),
        ({"messages": USER, "tools": 3}, 400, "tools", "function tools"),
        ({"messages": USER, "tool_choice": "auto"}, 400, "tool_choice", "needs tools"),
        ({"messages": USER, "tools": TOOLS, "tool_choice": "maybe"}, 400, "tool_choice", "auto, none"),
        (
            {"messages": USER, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            400,
            "tool_choice",
            "not among the tools",
        ),
        ({"messages": USER, "max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"messages": USER, "max_tokens": "3"}, 400, "max_tokens", "an integer"),
        ({"messages": USER, "max_tokens": 3, "min_tokens": 4}, 400, "min_tokens", "less than or equal"),
        ({"messages": USER, "stream_options": {"include_usage": True}}, 400, "stream_options", "`stream=True`"),
        ({"messages": USER, "stream": True, "stream_options": 3}, 400, "stream_options", "an object"),
        ({"messages": USER, "n": 2, "temperature": 0}, 400, "n", "greedy sampling, got 2"),
        ({"messages": USER, "stop": [3]}, 400, "stop", "list of strings"),
        ({"messages": USER, "response_format": {"type": "json_schema"}}, 400, "response_format", "schema"),
        ({"messages": USER, "response_format": "json"}, 400, "response_format", "objects"),
        ({"messages": USER, "kv_transfer_params": 3}, 400, "kv_transfer_params", "must be an object, got int"),
        (
            {"messages": [{"role": "user", "content": "word " * 40_000}]},
            400,
            "input_tokens",
            "maximum context length is 32768",
        ),
        (
            {
                "messages": USER,
                "tools": [{"function": {"name": "f", "parameters": {"type": "file"}}}],
                "tool_choice": "required",
            },
            400,
            "tools",
            "unknown type 'file'",
        ),
    ],
)
def test_bad_requests_get_vllms_error_shape(
    shared_fleet: EmulatedFleet, http: httpx2.Client, body: dict[str, Any], status: int, param: str, message: str
) -> None:
    answer = post(shared_fleet, http, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, status, param)
    assert message in error["message"]


@pytest.mark.parametrize("raw", [b"{", b"[1]", b""])
def test_a_body_that_is_no_object(shared_fleet: EmulatedFleet, http: httpx2.Client, raw: bytes) -> None:
    answer = http.post(shared_fleet.engine("d0").url + "/v1/chat/completions", content=raw)
    assert answer.status_code == 400
    assert "body" in answer.json()["error"]["message"]


def test_a_prompt_that_leaves_room_for_one_token_is_served(http: httpx2.Client) -> None:
    small = default_fleet(prefillers=0, decoders=1, time_scale=0, max_model_len=64, kv_cache_tokens=64)
    with EmulatedFleet(small) as fleet:
        # Two marks and 61 tokens of text leave one token.
        fits = post(fleet, http, messages=[{"role": "user", "content": "abcd" * 60}])
        assert fits.json()["usage"]["total_tokens"] == 64
        full = post(fleet, http, messages=[{"role": "user", "content": "abcd" * 61}])
        assert full.status_code == 400
        assert "(parameter=input_tokens, value=64)" in full.json()["error"]["message"]


async def test_the_openai_client_works_unchanged(shared_fleet: EmulatedFleet) -> None:
    url = shared_fleet.engine("d0").url + "/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="EMPTY", max_retries=0) as client:
        whole = await client.chat.completions.create(model="emulated", messages=USER, tools=TOOLS)  # type: ignore[call-overload]
        async with client.chat.completions.stream(model="emulated", messages=USER, tools=TOOLS) as stream:  # type: ignore[arg-type]
            final = await stream.get_final_completion()
        assert final.choices[0].message.tool_calls[0].function.arguments == (
            whole.choices[0].message.tool_calls[0].function.arguments
        )
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.chat.completions.create(model="other", messages=USER)  # type: ignore[arg-type]
        models = await client.models.list()
        assert models.data[0].id == "emulated"

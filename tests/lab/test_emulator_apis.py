"""Completions, responses and the rest of vLLM's surface."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest

from conserve_lab.emulator import EmulatedFleet
from conserve_lab.emulator.language import text_tokens

FLAT_TOOL = {
    "type": "function",
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}


def post(fleet: EmulatedFleet, http: httpx2.Client, path: str, **body: Any) -> httpx2.Response:
    return http.post(fleet.engine("d0").url + path, json={"model": "emulated", **body})


def events(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


# ---- completions ---------------------------------------------------------------------------------------------


def test_completions_stream_what_they_answer(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    body = {"prompt": "Once upon a time", "return_token_ids": True}
    whole = post(shared_fleet, http, "/v1/completions", **body).json()
    choice = whole["choices"][0]
    assert whole["usage"]["completion_tokens"] == 16
    assert choice["finish_reason"] == "length"
    assert choice["prompt_token_ids"] == list(text_tokens("Once upon a time"))
    stream = post(shared_fleet, http, "/v1/completions", **body, stream=True, stream_options={"include_usage": True})
    parts = events(stream.text)
    assert parts[-1]["usage"] == whole["usage"] | {"prompt_tokens_details": parts[-1]["usage"]["prompt_tokens_details"]}
    pieces = [part["choices"][0] for part in parts[:-1]]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    assert [token for piece in pieces for token in piece["token_ids"]] == choice["token_ids"]
    assert "prompt_token_ids" in pieces[0]
    assert "prompt_token_ids" not in pieces[1]


def test_completion_prompts_as_tokens_and_echo(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    ids = list(text_tokens("Once upon a time"))
    texts = [
        post(shared_fleet, http, "/v1/completions", prompt=prompt).json()["choices"][0]["text"]
        for prompt in ("Once upon a time", ids, [ids], ["Once upon a time"])
    ]
    assert len(set(texts)) == 1
    echoed = post(shared_fleet, http, "/v1/completions", prompt=ids, echo=True).json()
    assert echoed["choices"][0]["text"] == "Once upon a time" + texts[0]
    parts = events(post(shared_fleet, http, "/v1/completions", prompt=ids, echo=True, stream=True).text)
    assert "".join(part["choices"][0]["text"] for part in parts) == "Once upon a time" + texts[0]


@pytest.mark.parametrize("prompt", [None, "", [], ["a", "b"], [-1], [2**40], [[]], 3])
def test_bad_completion_prompts(shared_fleet: EmulatedFleet, http: httpx2.Client, prompt: object) -> None:
    answer = post(shared_fleet, http, "/v1/completions", prompt=prompt)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


# ---- responses -----------------------------------------------------------------------------------------------


def test_responses_text_streamed_and_whole(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    body = {"instructions": "Be kind.", "input": "hello"}
    whole = post(shared_fleet, http, "/v1/responses", **body).json()
    text = whole["output"][0]["content"][0]["text"]
    assert (whole["object"], whole["status"], whole["output"][0]["role"]) == ("response", "completed", "assistant")
    parts = events(post(shared_fleet, http, "/v1/responses", **body, stream=True).text)
    assert [part["sequence_number"] for part in parts] == list(range(len(parts)))
    kinds = [part["type"] for part in parts]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(part["delta"] for part in parts if part["type"] == "response.output_text.delta") == text
    assert parts[-1]["response"]["output"][0]["content"][0]["text"] == text
    assert parts[-1]["response"]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_a_responses_conversation_and_a_chat_have_the_same_tokens(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    chat_tool = {"type": "function", "function": {key: FLAT_TOOL[key] for key in ("name", "parameters")}}
    first = post(fleet, http, "/v1/responses", input="add 5", tools=[FLAT_TOOL]).json()
    call = first["output"][0]
    assert (call["type"], json.loads(call["arguments"])) == ("function_call", {"a": 5})
    items = [
        {"role": "user", "content": "add 5"},
        {"type": "reasoning", "summary": []},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "10"},
    ]
    second = post(fleet, http, "/v1/responses", input=items, tools=[FLAT_TOOL]).json()
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0
    chat = post(fleet, http, "/v1/chat/completions", messages=[{"role": "user", "content": "add 5"}], tools=[chat_tool])
    assert chat.json()["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == call["arguments"]


def test_responses_stream_calls(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    body = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "add 5"}]}], "tools": [FLAT_TOOL]}
    parts = events(post(shared_fleet, http, "/v1/responses", **body, stream=True).text)
    kinds = [part["type"] for part in parts]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 1
    deltas = [part["delta"] for part in parts if part["type"] == "response.function_call_arguments.delta"]
    done = next(part for part in parts if part["type"] == "response.function_call_arguments.done")
    assert "".join(deltas) == done["arguments"] == '{"a": 5}'
    assert parts[-1]["response"]["output"][0]["arguments"] == '{"a": 5}'


def test_responses_limits_formats_and_choices(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    short = post(shared_fleet, http, "/v1/responses", input="x", max_output_tokens=2).json()
    assert (short["status"], short["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    streamed = events(post(shared_fleet, http, "/v1/responses", input="x", max_output_tokens=2, stream=True).text)
    assert streamed[-1]["type"] == "response.incomplete"
    schema = {"type": "object", "properties": {"ok": {"const": True}}, "required": ["ok"]}
    bound = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
    answer = post(shared_fleet, http, "/v1/responses", input="x", text=bound).json()
    assert json.loads(answer["output"][0]["content"][0]["text"]) == {"ok": True}
    free = post(shared_fleet, http, "/v1/responses", input="x", text={"format": {"type": "json_object"}}).json()
    assert isinstance(json.loads(free["output"][0]["content"][0]["text"]), dict)
    for choice, kind in (
        ("none", "message"),
        ("required", "function_call"),
        ({"type": "function", "name": "add"}, "function_call"),
    ):
        answer = post(shared_fleet, http, "/v1/responses", input="x", tools=[FLAT_TOOL], tool_choice=choice).json()
        assert answer["output"][0]["type"] == kind


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"input": ""}, 400, "non-empty"),
        ({"input": [3]}, 400, "must be an object"),
        ({"input": [{"type": "computer_call"}]}, 400, "'computer_call' is not supported"),
        ({"input": "x", "previous_response_id": "resp_1"}, 404, "stores no responses"),
        ({"input": "x", "tool_choice": "maybe"}, 400, "tool_choice"),
        ({"input": "x", "tool_choice": {"type": "function", "name": "f"}}, 400, "not among"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, 400, "schema"),
        ({"input": "x", "max_output_tokens": 0}, 400, "at least 1"),
    ],
)
def test_bad_responses_requests(
    shared_fleet: EmulatedFleet, http: httpx2.Client, body: dict[str, Any], status: int, message: str
) -> None:
    answer = post(shared_fleet, http, "/v1/responses", **body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_calls_of_several_items_join_one_assistant_message(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a":1}'}
    output = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "7"}]}
    message = {"role": "assistant", "content": [{"type": "output_text", "text": "I add."}]}
    items = [{"role": "user", "content": "x"}, message, call, call, output, output]
    answer = post(shared_fleet, http, "/v1/responses", input=items)
    assert answer.status_code == 200
    assert "returned: 7" in answer.json()["output"][0]["content"][0]["text"]


def test_the_openai_client_reads_responses(shared_fleet: EmulatedFleet) -> None:
    with openai.OpenAI(base_url=shared_fleet.engine("d0").url + "/v1", api_key="EMPTY", max_retries=0) as client:
        whole = client.responses.create(model="emulated", input="hello")
        with client.responses.stream(model="emulated", input="hello") as stream:
            final = stream.get_final_response()
        assert final.output_text == whole.output_text
        with client.responses.stream(model="emulated", input="add 5", tools=[FLAT_TOOL]) as stream:  # type: ignore[list-item]
            called = stream.get_final_response()
        assert called.output[0].type == "function_call"


# ---- the rest ------------------------------------------------------------------------------------------------


def test_discovery_routes(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    url = shared_fleet.engine("d0").url
    card = http.get(url + "/v1/models").json()["data"][0]
    assert (card["id"], card["root"], card["max_model_len"]) == ("emulated", "emulated", 32_768)
    assert http.get(url + "/version").json() == {"version": "0.32.0"}
    assert (http.get(url + "/health").status_code, http.get(url + "/ping").content) == (200, b"")
    assert http.get(url + "/load").json() == {"server_load": 0}
    assert http.get(url + "/server_info").status_code == 404
    text = post(shared_fleet, http, "/tokenize", prompt="some text").json()
    assert text["count"] == 3
    assert post(shared_fleet, http, "/detokenize", tokens=text["tokens"]).json() == {"prompt": "some text"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "model": "other"}),
        ("/detokenize", {"tokens": "abc"}),
        ("/detokenize", {"tokens": [-1]}),
    ],
)
def test_bad_tokenizer_requests(
    shared_fleet: EmulatedFleet, http: httpx2.Client, path: str, body: dict[str, Any]
) -> None:
    assert post(shared_fleet, http, path, **body).status_code in {400, 404}


def test_requests_are_recorded_with_their_session(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    url = fleet.engine("d0").url
    message = [{"role": "user", "content": "x"}]
    body = {"model": "emulated", "messages": message}
    for headers, extra in (({"X-Session-ID": "c/1", "X-Request-Id": "r1"}, {}), ({}, {"session_id": "c/1"})):
        http.post(url + "/v1/chat/completions", json={**body, **extra}, headers=headers)
    http.post(url + "/v1/chat/completions", json={**body, "model": "other"})
    state = http.get(url + "/emulator/state").json()
    assert state["sessions"] == {"c/1": 2}
    records = fleet.engine("d0").requests
    assert [entry["status"] for entry in http.get(url + "/emulator/requests").json()] == [200, 200, 404]
    assert [entry.session_id for entry in records] == ["c/1", "c/1", None]
    assert records[0].request_id == "r1"
    assert records[0].completion_tokens > 0
    assert "does not exist" in records[2].error
    fleet.engine("d0").clear_requests()
    assert fleet.engine("d0").requests == []

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk._bodies import BadBody, TurnBody, decode_leg, kind_of, prefill_leg, read_body, wire_path
from conserve_sdk._kind import Kind

MESSAGES = [{"role": "user", "content": "hi"}]


def body(kind: Kind = Kind.CHAT, **fields: Any) -> TurnBody:
    return read_body(kind, json.dumps({"model": "m", **fields}).encode())


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("POST", "/v1/chat/completions", Kind.CHAT),
        ("post", "/some/prefix/v1/chat/completions/", Kind.CHAT),
        ("POST", "/v1/completions", Kind.COMPLETIONS),
        ("POST", "/v1/responses", Kind.RESPONSES),
        ("GET", "/v1/chat/completions", None),
        ("GET", "/v1/models", None),
        ("POST", "/v1/embeddings", None),
        ("POST", "/v1/responses/resp_1/cancel", None),
    ],
)
def test_which_requests_are_turns(method: str, path: str, kind: Kind | None) -> None:
    assert kind_of(method, path) is kind


@pytest.mark.parametrize(
    ("path", "wire"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/proxy/a/v1/completions", "/v1/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/openai/responses/", "/v1/responses"),
        ("/tokenize", "/tokenize"),
    ],
)
def test_the_path_an_engine_knows(path: str, wire: str) -> None:
    assert wire_path(path) == wire


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "JSON object"),
        (b"{}", "model"),
        (b'{"model": ""}', "model"),
        (b'{"model": 3}', "model"),
    ],
)
def test_a_bad_body_says_what_is_wrong(raw: bytes, says: str) -> None:
    with pytest.raises(BadBody, match=says):
        read_body(Kind.CHAT, raw)


def test_an_untouched_body_keeps_its_bytes() -> None:
    raw = b' {"model" : "m",\n "messages": [], "stream":true}'
    read = read_body(Kind.CHAT, raw)
    assert read.raw is raw
    assert (read.model, read.stream, read.stripped) == ("m", True, False)
    assert decode_leg(read, None) is raw


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_transfer_params": {"do_remote_prefill": True}},
        {"vllm_xargs": {"kv_transfer_params": "x", "kept": 1}},
        {"extra_body": {"kv_transfer_params": {"a": 1}}},
    ],
)
def test_transfer_params_of_the_application_are_taken_out(fields: dict[str, Any]) -> None:
    read = body(messages=MESSAGES, **fields)
    assert read.stripped
    assert b"kv_transfer_params" not in read.raw
    assert json.loads(read.raw)["messages"] == MESSAGES
    assert json.loads(read.raw).get("vllm_xargs", {"kept": 1}) == {"kept": 1}


def test_an_empty_transfer_params_field_goes_too() -> None:
    read = body(messages=MESSAGES, kv_transfer_params=None)
    sent = json.loads(decode_leg(read, {"do_remote_decode": True}))
    assert sent["kv_transfer_params"] == {"do_remote_decode": True}


def test_prefill_leg_of_a_chat_overrides_exactly_what_must_be() -> None:
    fields: dict[str, Any] = {
        "messages": MESSAGES,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}],
        "tool_choice": "required",
        "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"enable_thinking": False},
        "add_generation_prompt": True,
        "temperature": 0.3,
        "seed": 7,
        "stop": ["x"],
        "logit_bias": {"2": 100},
        "reasoning_effort": "low",
    }
    overridden = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 500,
        "max_completion_tokens": 600,
        "min_tokens": 20,
        "n": 1,
        "best_of": 1,
        "use_beam_search": False,
        "logprobs": True,
        "top_logprobs": 3,
        "prompt_logprobs": None,
    }
    leg = json.loads(prefill_leg(body(**fields, **overridden), {"do_remote_decode": True}))
    assert leg == {
        "model": "m",
        **fields,
        "stream": False,
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "n": 1,
        "return_token_ids": True,
        "kv_transfer_params": {"do_remote_decode": True},
    }


def test_prefill_leg_sets_the_limit_of_each_route() -> None:
    chat = json.loads(prefill_leg(body(messages=MESSAGES), {}))
    assert chat["max_tokens"] == 1
    assert "max_completion_tokens" not in chat
    assert "n" not in chat
    responses = json.loads(prefill_leg(body(Kind.RESPONSES, input="hi", max_output_tokens=50), {}))
    assert responses["max_output_tokens"] == 1
    assert "max_tokens" not in responses
    assert json.loads(prefill_leg(body(Kind.COMPLETIONS, prompt="hi"), {}))["max_tokens"] == 1


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        (Kind.CHAT, {"messages": MESSAGES}, ""),
        (Kind.CHAT, {"n": 1}, ""),
        (Kind.CHAT, {"n": 2}, "several_choices"),
        (Kind.COMPLETIONS, {"prompt": "a", "best_of": 3}, "several_choices"),
        (Kind.CHAT, {"use_beam_search": True}, "beam_search"),
        (Kind.CHAT, {"prompt_logprobs": 0}, "prompt_logprobs"),
        (Kind.COMPLETIONS, {"prompt": "a", "echo": True}, "prompt_logprobs"),
        (Kind.COMPLETIONS, {"prompt": ["a", "b"]}, "several_prompts"),
        (Kind.COMPLETIONS, {"prompt": [[1, 2], [3]]}, "several_prompts"),
        (Kind.COMPLETIONS, {"prompt": ["a"]}, ""),
        (Kind.COMPLETIONS, {"prompt": [1, 2, 3]}, ""),
        (Kind.COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "no_output"),
        (Kind.RESPONSES, {"previous_response_id": "resp_1"}, "stored_response"),
        (Kind.RESPONSES, {"background": True}, "stored_response"),
        (Kind.RESPONSES, {"input": "hi"}, ""),
    ],
)
def test_what_must_not_travel_with_transferred_kv(kind: Kind, fields: dict[str, Any], reason: str) -> None:
    assert body(kind, **fields).local_because == reason


@pytest.mark.parametrize("raw", [b'{"model":"m"}', b' \n{ "model": "m" , "a": "\\ud800" }', b'{"model":"m","s":"{"}'])
def test_decode_leg_is_the_applications_body_plus_params(raw: bytes) -> None:
    read = read_body(Kind.CHAT, raw)
    sent = decode_leg(read, {"do_remote_decode": True})
    assert json.loads(sent) == {**json.loads(raw), "kv_transfer_params": {"do_remote_decode": True}}
    assert sent.endswith(raw.lstrip()[1:].lstrip())


def test_a_body_in_another_encoding_is_written_anew() -> None:
    read = read_body(Kind.CHAT, '{"model":"m","messages":[{"role":"user","content":"é"}]}'.encode("utf-16"))
    assert json.loads(decode_leg(read, {"a": 1}))["messages"][0]["content"] == "é"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(fields=st.dictionaries(st.text(), JSON, max_size=5))
def test_both_legs_say_the_same_prompt(fields: dict[str, Any]) -> None:
    data = {**fields, "model": "m", "messages": [{"role": "user", "content": fields.get("content")}]}
    for name in ("vllm_xargs", "extra_body", "kv_transfer_params"):
        data.pop(name, None)
    read = read_body(Kind.CHAT, json.dumps(data).encode())
    decode = json.loads(decode_leg(read, {"p": 1}))
    prefill = json.loads(prefill_leg(read, {"p": 1}))
    assert decode == {**data, "kv_transfer_params": {"p": 1}}
    assert prefill["messages"] == decode["messages"]
    changed = {key for key in decode if prefill.get(key, ...) != decode[key]}
    assert changed <= {
        "stream", "stream_options", "max_tokens", "max_completion_tokens", "min_tokens", "n", "best_of",
        "use_beam_search", "logprobs", "top_logprobs", "prompt_logprobs", "return_token_ids",
    }  # fmt: skip

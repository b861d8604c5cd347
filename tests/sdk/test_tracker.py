from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk import _tracker
from conserve_sdk._kind import Kind
from conserve_sdk._tracker import TurnFacts, TurnTracker
from conserve_sdk.telemetry import TBT_SAMPLES_MAX
from conserve_sdk.testing import EngineReply


def follow(chunks: tuple[bytes, ...], *, kind: Kind = Kind.CHAT, streamed: bool = True) -> TurnFacts:
    """Chunks arrive one millisecond apart, from 1000 us on."""
    tracker = TurnTracker(kind, streamed=streamed)
    for index, chunk in enumerate(chunks):
        tracker.feed(chunk, now_us=(index + 1) * 1000)
    tracker.end()
    return tracker.facts()


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def test_a_chat_stream() -> None:
    facts = follow(EngineReply.chat_stream("a", "b", "c").chunks)
    assert facts.first_token_us == 2000  # the first event only names the role
    assert facts.gaps_us == (1000, 1000)
    assert (facts.prompt_tokens, facts.completion_tokens) == (100, 3)
    assert (facts.finish_reason, facts.complete, facts.response_id) == ("stop", True, "chatcmpl-1")
    assert not facts.calls_tools


def test_a_tool_call_in_a_stream() -> None:
    facts = follow(EngineReply.chat_stream(tool="look").chunks)
    assert facts.tool_names == ("look",)
    assert facts.finish_reason == "tool_calls"
    assert facts.calls_tools
    assert facts.first_token_us == 2000


def test_a_named_tool_call_ends_with_stop_and_still_calls_tools() -> None:
    delta = {"tool_calls": [{"index": 0, "function": {"name": "look", "arguments": ""}}, {"index": 1}, "x"]}
    facts = follow((event({"choices": [{"delta": delta, "finish_reason": "stop"}]}),))
    assert facts.calls_tools


def test_without_usage_the_counts_are_unknown() -> None:
    facts = follow(EngineReply.chat_stream("a", usage=False).chunks)
    assert (facts.prompt_tokens, facts.completion_tokens, facts.cached_tokens) == (0, 0, 0)


def test_a_stream_cut_off_is_not_complete() -> None:
    facts = follow(EngineReply.chat_stream("a", "b", end=False).chunks)
    assert not facts.complete
    assert facts.finish_reason == ""


@given(st.data())
def test_facts_do_not_depend_on_how_the_bytes_are_cut(data: st.DataObject) -> None:
    whole = b"".join(EngineReply.chat_stream("é", "日本", "x", tool="f").chunks).replace(b"\n\n", b"\r\n\r\n")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    tracker = TurnTracker(Kind.CHAT, streamed=True)
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        tracker.feed(whole[start:end], now_us=5)
    facts = tracker.facts()
    assert (facts.first_token_us, len(facts.gaps_us), facts.tool_names) == (5, 3, ("f",))
    assert (facts.completion_tokens, facts.finish_reason, facts.complete) == (3, "tool_calls", True)


def test_an_error_at_the_head_of_a_stream() -> None:
    tracker = TurnTracker(Kind.CHAT, streamed=True)
    tracker.feed(EngineReply.stream_error(status=500, message="gone").chunks[0], now_us=1)
    assert tracker.error_status == 500
    assert tracker.facts().error == "gone"
    assert tracker.facts().first_token_us is None


def test_an_error_without_a_code_counts_as_the_engines() -> None:
    facts = follow((event({"error": {"type": "Oops"}}),))
    assert (facts.error, facts.error_status) == ("Oops", 500)


def test_what_is_no_event_is_left_alone() -> None:
    facts = follow((b": ping\n\n", b"data: {broken\n\n", b"data: [1]\n\n", b"event: x\n", b"", b"data: [DONE]\n\n"))
    assert facts == TurnFacts(complete=True)


def test_a_completions_stream() -> None:
    chunks = (
        event({"id": "cmpl-1", "choices": [{"text": "", "finish_reason": None}]}),
        event({"id": "cmpl-1", "choices": [{"text": "a"}]}),
        event({"id": "cmpl-1", "choices": [{"text": "b", "finish_reason": "length"}], "usage": {"prompt_tokens": 4}}),
    )
    facts = follow(chunks, kind=Kind.COMPLETIONS)
    assert (facts.first_token_us, facts.gaps_us, facts.finish_reason) == (2000, (1000,), "length")
    assert facts.prompt_tokens == 4


def test_a_responses_stream() -> None:
    details = {"cached_tokens": 8, "cache_write_tokens": 1}
    usage = {"input_tokens": 9, "output_tokens": 2, "input_tokens_details": details}
    output = [{"type": "message"}, {"type": "function_call", "name": "look"}]
    done = {"id": "resp_1", "status": "completed", "usage": usage, "output": output}
    chunks = (
        event({"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}}),
        event({"type": "response.output_text.delta", "delta": "a"}),
        event({"type": "response.function_call_arguments.delta", "delta": "{"}),
        event({"type": "response.output_text.done", "text": "a"}),
        event({"type": "response.completed", "response": done}),
    )
    facts = follow(chunks, kind=Kind.RESPONSES)
    assert (facts.first_token_us, facts.gaps_us) == (2000, (1000,))
    assert (facts.prompt_tokens, facts.completion_tokens, facts.cached_tokens) == (9, 2, 8)
    assert facts.computed_tokens == 1
    assert (facts.response_id, facts.finish_reason, facts.tool_names) == ("resp_1", "completed", ("look",))
    assert facts.complete


def test_a_whole_chat_answer() -> None:
    reply = EngineReply.chat("hello", prompt_tokens=40, completion_tokens=6, cached_tokens=32)
    facts = follow((reply.chunks[0][:50], reply.chunks[0][50:]), streamed=False)
    assert facts.first_token_us == 1000
    assert (facts.prompt_tokens, facts.completion_tokens, facts.cached_tokens) == (40, 6, 32)
    assert facts.complete
    assert follow(EngineReply.chat(tool="f").chunks, streamed=False).tool_names == ("f",)


def test_a_whole_responses_answer() -> None:
    reply = EngineReply.json({"id": "resp_2", "status": "completed", "output": [{"type": "function_call"}]})
    facts = follow(reply.chunks, kind=Kind.RESPONSES, streamed=False)
    assert (facts.response_id, facts.finish_reason, facts.tool_names) == ("resp_2", "completed", ())


def test_a_whole_completions_answer() -> None:
    reply = EngineReply.json({"id": "cmpl-1", "choices": [{"text": "x", "finish_reason": "stop"}]})
    assert follow(reply.chunks, kind=Kind.COMPLETIONS, streamed=False).finish_reason == "stop"


def test_half_a_surrogate_pair_is_no_obstacle() -> None:
    tracker = TurnTracker(Kind.CHAT, streamed=False)
    tracker.feed(
        b'{"id": "r", "choices": [{"message": {"content": "\\ud83d"}}], "usage": {"prompt_tokens": 3}}', now_us=1
    )
    tracker.end()
    assert (tracker.facts().response_id, tracker.facts().prompt_tokens) == ("r", 3)


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]"])
def test_an_answer_that_is_no_json_object(content: bytes) -> None:
    assert not follow((content,), streamed=False).complete


def test_odd_fields_do_not_hurt() -> None:
    data = {"id": None, "choices": "x", "usage": {"prompt_tokens": True, "completion_tokens": -3}}
    facts = follow((event(data), event({"choices": [{"delta": "x"}, 7]})))
    assert facts == TurnFacts()


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tracker, "_BODY_BYTES_MAX", 10)
    monkeypatch.setattr(_tracker, "_EVENT_BYTES_MAX", 10)
    big = EngineReply.chat("x" * 100).chunks[0]
    assert not follow((big, big), streamed=False).complete
    assert follow((b"data: " + b"x" * 20, *EngineReply.chat_stream("a").chunks)).first_token_us is None


def test_tool_names_are_bounded() -> None:
    calls = [{"function": {"name": str(number)}} for number in range(100)]
    whole = json.dumps({"choices": [{"message": {"tool_calls": calls}}]}).encode()
    assert len(follow((whole,), streamed=False).tool_names) == 64


def test_gaps_are_bounded() -> None:
    tracker = TurnTracker(Kind.CHAT, streamed=True)
    token = event({"choices": [{"delta": {"content": "a"}}]})
    for index in range(TBT_SAMPLES_MAX + 10):
        tracker.feed(token, now_us=index)
    assert len(tracker.facts().gaps_us) == TBT_SAMPLES_MAX

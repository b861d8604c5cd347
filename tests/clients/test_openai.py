"""Plain `openai` clients, blocking and async, over a broker and emulated engines: every way to ask, one script each.

What needs a server of a special kind stands with the transport: connections and their reuse, event loops and forks
(`tests/sdk/test_transport.py`), single flight, cancellation at every point (`tests/sdk/test_transport_flight.py`),
transfers that fail (`tests/sdk/test_transfer_dangers.py`).
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import openai
import pytest
from pydantic import BaseModel

from conserve_sdk import conversation

from .conftest import LONG, Colour


class Verdict(BaseModel):
    tidy: bool
    pages: int


TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}


@pytest.fixture
def named() -> conversation:
    return conversation(f"c-{uuid4().hex}")


# ---- chat -----------------------------------------------------------------------------------------------------


def test_a_conversation_is_prefilled_once_and_stays_where_it_is(colour: Colour, named: conversation) -> None:
    fields = colour.chat()
    with named:
        for question in ("And then?", "And after that?"):
            answer = colour.call(lambda c: c.chat.completions.create(**fields))
            assert answer.usage.prompt_tokens > 900
            fields["messages"] += [
                {"role": "assistant", "content": answer.choices[0].message.content},
                {"role": "user", "content": question},
            ]
        colour.items(lambda c: c.chat.completions.create(**fields, stream=True))
    assert [record.migrated for record in colour.records] == [True, False, False]
    assert len({(record.lease_id, record.decoder_id, record.conversation_id) for record in colour.records}) == 1
    assert colour.records[1].cached_tokens > 900


def test_answers_equal_those_of_an_engine_asked_directly(colour: Colour, named: conversation, direct: Any) -> None:
    fields = colour.chat(f"Equal {uuid4().hex}")
    with named:
        ours = colour.call(lambda c: c.chat.completions.create(**fields))
    assert colour.records[-1].migrated
    assert ours.choices[0].message == direct.chat.completions.create(**fields).choices[0].message


def test_a_stream_says_what_the_whole_answer_says(colour: Colour, named: conversation) -> None:
    fields = colour.chat(f"Stream {uuid4().hex}")
    with named:
        chunks = colour.items(lambda c: c.chat.completions.create(**fields, stream=True))
        whole = colour.call(lambda c: c.chat.completions.create(**fields))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content


def test_usage_at_the_end_of_a_stream(colour: Colour, named: conversation) -> None:
    fields = colour.chat(stream=True, stream_options={"include_usage": True})
    with named:
        chunks = colour.items(lambda c: c.chat.completions.create(**fields))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == colour.records[-1].completion_tokens > 0


def test_streaming_responses(colour: Colour, named: conversation) -> None:
    with named:
        fields = colour.chat(stream=True)
        lines = colour.inside(
            lambda c: c.chat.completions.with_streaming_response.create(**fields), lambda raw: raw.iter_lines()
        )
    assert lines[0].startswith("data: ")
    assert "data: [DONE]" in lines
    assert colour.records[-1].error == ""


def test_the_stream_helper(colour: Colour, named: conversation) -> None:
    with named:
        events = colour.items(lambda c: c.chat.completions.stream(**colour.chat()))
    assert events[-1].type == "content.done"
    assert [event.delta for event in events if event.type == "content.delta"]
    assert colour.records[-1].error == ""


def test_the_stream_helper_has_the_whole_answer_at_its_end(colour: Colour, named: conversation) -> None:
    with named:
        final = colour.inside(
            lambda c: c.chat.completions.stream(**colour.chat()), lambda stream: stream.get_final_completion()
        )
    assert final.choices[0].message.content


def test_a_parsed_answer(colour: Colour, named: conversation) -> None:
    with named:
        answer = colour.call(lambda c: c.chat.completions.parse(**colour.chat(response_format=Verdict)))
    assert isinstance(answer.choices[0].message.parsed, Verdict)


def test_a_tool_loop_is_one_time_to_the_first_effective_token(colour: Colour, named: conversation) -> None:
    fields = colour.chat("Look up a.", tools=[TOOL])
    with named:
        message = colour.call(lambda c: c.chat.completions.create(**fields)).choices[0].message
        fields["messages"] += [
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3 pages"},
        ]
        assert colour.call(lambda c: c.chat.completions.create(**fields)).choices[0].message.content
    first, second = colour.records
    assert (first.finish_reason, first.ttfet_ms) == ("tool_calls", None)
    assert second.ttfet_ms is not None


# ---- the other routes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_completions(colour: Colour, named: conversation, stream: bool) -> None:
    fields = {"model": colour.stack.model, "prompt": f"{stream} {LONG}", "max_tokens": 20}
    with named:
        if stream:
            chunks = colour.items(lambda c: c.completions.create(**fields, stream=True))
            text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        else:
            text = colour.call(lambda c: c.completions.create(**fields)).choices[0].text
    assert text
    assert (colour.records[-1].path, colour.records[-1].migrated) == ("/v1/completions", True)


def test_responses(colour: Colour, named: conversation) -> None:
    said = [{"role": "user", "content": "Hello."}]
    fields: dict[str, Any] = {"model": colour.stack.model, "instructions": LONG, "input": said}
    with named:
        for _ in range(2):
            answer = colour.call(lambda c: c.responses.create(**fields))
            fields["input"] += [
                {"role": "assistant", "content": answer.output_text},
                {"role": "user", "content": "Go on."},
            ]
        events = colour.items(lambda c: c.responses.create(**fields, stream=True))
    assert events[-1].type == "response.completed"
    assert [record.migrated for record in colour.records] == [True, False, False]
    assert len({record.decoder_id for record in colour.records}) == 1


def test_the_stream_helper_of_responses(colour: Colour, named: conversation) -> None:
    with named:
        final = colour.inside(
            lambda c: c.responses.stream(model=colour.stack.model, instructions=LONG, input="Hello."),
            lambda stream: stream.get_final_response(),
        )
    assert final.output_text
    assert colour.records[-1].error == ""


def test_a_parsed_response(colour: Colour, named: conversation) -> None:
    with named:
        answer = colour.call(
            lambda c: c.responses.parse(model=colour.stack.model, input="Is it tidy?", text_format=Verdict)
        )
    assert isinstance(answer.output_parsed, Verdict)


def test_a_predecessor_is_looked_for_where_it_was_answered(colour: Colour) -> None:
    """The emulated engines store no answers, like vLLM by default: what counts is who is asked, without any id."""
    first = colour.call(lambda c: c.responses.create(model=colour.stack.model, instructions=LONG, input="Hello."))
    with pytest.raises(openai.APIStatusError) as refused:
        colour.call(
            lambda c: c.responses.create(model=colour.stack.model, input="Go on.", previous_response_id=first.id)
        )
    assert "stores no responses" in str(refused.value)
    one, other = colour.records
    assert (one.conversation_id, one.lineage, one.decoder_id) == (
        other.conversation_id,
        other.lineage,
        other.decoder_id,
    )
    assert not other.migrated


# ---- identity -------------------------------------------------------------------------------------------------


def test_conversations_keep_apart(colour: Colour) -> None:
    mark = uuid4().hex
    for turn in range(3):
        for number in range(10):
            with conversation(f"apart-{number}-{mark}"):
                said = [{"role": "user", "content": f"{number} {word} " * 40} for word in ("a", "b", "c")[: turn + 1]]
                fields = colour.chat() | {"messages": said}
                colour.call(lambda c, fields=fields: c.chat.completions.create(**fields))
    places = {(record.conversation_id, record.lease_id, record.decoder_id) for record in colour.records}
    assert len(places) == 10
    assert sum(record.migrated for record in colour.records) == 10


# ---- errors ---------------------------------------------------------------------------------------------------


def test_a_call_may_have_its_own_timeout(fresh_colour: Colour, named: conversation) -> None:
    for engine in fresh_colour.stack.fleet.engines:
        engine.faults(pause=True)
    client = fresh_colour.client.with_options(max_retries=0, timeout=0.4)
    with named, pytest.raises(openai.APITimeoutError):
        fresh_colour.call(lambda c: c.chat.completions.create(**fresh_colour.chat()), client)
    for engine in fresh_colour.stack.fleet.engines:
        engine.faults(pause=False)


def test_a_decoder_that_dies_is_replaced_without_a_retry_of_the_client(
    fresh_colour: Colour, named: conversation
) -> None:
    client = fresh_colour.client.with_options(max_retries=0)
    with named:
        fresh_colour.call(lambda c: c.chat.completions.create(**fresh_colour.chat()), client)
        first = fresh_colour.records[-1]
        fresh_colour.stack.fleet.kill(first.decoder_id)
        fresh_colour.call(lambda c: c.chat.completions.create(**fresh_colour.chat()), client)
    second = fresh_colour.records[-1]
    assert second.decoder_id != first.decoder_id
    assert (second.failovers, second.epoch) == (1, first.epoch + 1)


def test_a_busy_engine_is_tried_again_by_the_client(fresh_colour: Colour, named: conversation) -> None:
    for engine in fresh_colour.stack.fleet.decoders:
        engine.faults(fail_next=1, fail_status=429)
    with named:
        answer = fresh_colour.call(lambda c: c.chat.completions.create(**fresh_colour.chat()))
    assert answer.choices[0].message.content
    assert [record.error for record in fresh_colour.records] == ["http_429", ""]


def test_a_stream_that_breaks_off_is_never_repeated(fresh_colour: Colour, named: conversation) -> None:
    for engine in fresh_colour.stack.fleet.decoders:
        engine.faults(drop_next=1, drop_after_chunks=3)
    with named, pytest.raises(openai.APIConnectionError):
        fresh_colour.items(lambda c: c.chat.completions.create(**fresh_colour.chat(), stream=True))
    assert [record.error for record in fresh_colour.records] == ["stream_dropped"]

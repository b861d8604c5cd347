"""Events known by their bytes: what is seen of a stream is what parsing every event shows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk import _tracker
from conserve_sdk._kind import Kind
from conserve_sdk._stencil import Stencil, cut_stencil
from conserve_sdk._tracker import TurnFacts, TurnTracker

TEXTS = st.text(max_size=6) | st.sampled_from(['"', "\\", '"}', "\n", "data: x", "é", "\u2028", "#", "content", '":"'])
FIELDS = st.sampled_from(["content", "reasoning_content", "reasoning", "refusal", "unknown"])
FINISHES = st.sampled_from([None, None, None, "", "stop", "tool_calls"])
CALLS = st.lists(
    st.fixed_dictionaries({}, optional={"name": st.sampled_from(["", "look"]), "arguments": TEXTS}), max_size=2
).map(lambda functions: [{"index": index, "function": function} for index, function in enumerate(functions)])
DELTAS = st.dictionaries(FIELDS, TEXTS | st.none(), max_size=2) | CALLS.map(lambda calls: {"tool_calls": calls})
CHOICES = st.builds(
    lambda delta, finish, text: {"index": 0, "delta": delta, "text": text, "finish_reason": finish},
    DELTAS,
    FINISHES,
    TEXTS,
)
USAGES = st.sampled_from([None, None, {"prompt_tokens": 7}, {"prompt_tokens": 8, "completion_tokens": 1}])
OBJECTS = st.builds(
    lambda choices, usage, extra: {"id": "c-1", "model": "m", "choices": choices, "usage": usage, **extra},
    st.lists(CHOICES, min_size=1, max_size=2),
    USAGES,
    st.sampled_from([{}, {}, {}, {"error": {"message": "no", "code": 503}}, {"content": "x"}]),
)
ENCODED = st.builds(
    lambda data, plain, spaced: json.dumps(data, ensure_ascii=plain, separators=None if spaced else (",", ":")),
    OBJECTS,
    st.booleans(),
    st.booleans(),
).map(lambda text: text.encode("utf-8", "surrogatepass"))
RUNS = st.builds(  # an engine's own way: one event after the other, nothing changed but the text
    lambda texts, field: [
        json.dumps({"id": "c", "choices": [{"delta": {field: text}, "finish_reason": None}]}).encode() for text in texts
    ],
    st.lists(TEXTS, max_size=5),
    FIELDS,
)
EVENTS = (RUNS | st.lists(ENCODED, max_size=3)).map(lambda payloads: [b"data: " + each + b"\n\n" for each in payloads])
ODDITIES = st.sampled_from(
    [b": ping\n\n", b"event: x\n", b"data: [DONE]\n\n", b"data: {\n\n", b"data: 1\n\n", b'data: {"id":"c","choices"']
)
STREAMS = st.lists(EVENTS | ODDITIES.map(lambda odd: [odd]), max_size=6).map(
    lambda parts: [each for part in parts for each in part]
)
KINDS = st.sampled_from(list(Kind))


def follow(chunks: list[bytes], kind: Kind, *, stencils: bool) -> tuple[TurnFacts, bool, int]:
    tracker = TurnTracker(kind, streamed=True)
    if not stencils:
        tracker._stencils_left = 0
    for index, chunk in enumerate(chunks):
        tracker.feed(chunk, now_us=(index + 1) * 1_000)
    tracker.end()
    return tracker.facts(), tracker.saw_end, tracker.error_status


@given(KINDS, STREAMS)
def test_event_by_event_the_facts_are_those_of_parsing_all(kind: Kind, chunks: list[bytes]) -> None:
    assert follow(chunks, kind, stencils=True) == follow(chunks, kind, stencils=False)


@given(KINDS, STREAMS, st.data())
def test_cut_anywhere_the_facts_are_those_of_parsing_all(kind: Kind, parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    chunks = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert follow(chunks, kind, stencils=True) == follow(chunks, kind, stencils=False)


@given(st.binary(max_size=8), st.integers(0, 3), st.binary(max_size=2))
def test_bytes_that_no_engine_writes(middle: bytes, dropped: int, after: bytes) -> None:
    good = event("hello")
    head, tail = good.split(b"hello")
    chunks = [good, head + middle + tail[dropped:] + after, good, b"data: [DONE]\n\n"]
    assert follow(chunks, Kind.CHAT, stencils=True) == follow(chunks, Kind.CHAT, stencils=False)


def event(text: str) -> bytes:
    data = {"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return b"data: " + json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def test_one_event_is_parsed_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    real = _tracker._json_object
    monkeypatch.setattr(_tracker, "_json_object", lambda payload: parsed.append(payload) or real(payload))
    chunks = [event(text) for text in ("one", "two", "three\\n", "vier ü", 'quo"ted')]
    facts, *_ = follow(chunks, Kind.CHAT, stencils=True)
    assert len(parsed) == 1
    assert facts.first_token_us == 1_000
    assert facts.gaps_us == (1_000,) * 4


def test_tries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[bytes] = []
    monkeypatch.setattr(_tracker, "cut_stencil", lambda chunk, *_: tries.append(chunk))
    follow([event(str(number)) for number in range(20)], Kind.CHAT, stencils=True)
    assert len(tries) == _tracker._STENCILS_MAX


def cut(text: str, *, holder: dict[str, Any], key: str = "content") -> Stencil | None:
    data = {"a": holder}
    return cut_stencil(b"data: " + text.encode() + b"\n\n", holder, key, data)


def test_a_place_that_is_not_the_texts_is_refused() -> None:
    # Of two equal names the last one counts, and both look alike.
    assert cut('{"a":{"content":"x","content":"y"}}', holder={"content": "y"}) is not None
    assert cut('{"a":{"content":"x","other":1}}', holder={"content": "x"}) is None  # not what was parsed
    assert cut('{"b":"\\"content\\":\\"x"}', holder={"content": "x"}) is None
    many = ",".join('{"content":"x"}' for _ in range(9))
    assert cut(f'{{"b":[{many}],"a":{{"content":"x"}}}}', holder={"content": "x"}) is None  # too many places


def test_the_event_is_left_as_it_is() -> None:
    holder = {"content": "x"}
    assert cut('{"a":{"content":"x"}}', holder=holder) is not None
    assert holder == {"content": "x"}


def test_a_probe_that_the_event_does_not_hold_is_found() -> None:
    stencil = cut('{"a":{"content":"##"}}', holder={"content": "##"})
    assert stencil is not None
    assert stencil.fits(b'data: {"a":{"content":"#"}}\n\n')
    assert not stencil.fits(b'data: {"a":{"content":""}}\n\n')
    assert not stencil.fits(b'data: {"a":{"content":"\xff"}}\n\n')

"""Follow-up turns read by what was added: the result is that of reading all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk import _prompts
from conserve_sdk._bodies import BadBody, prefill_leg, read_body
from conserve_sdk._digest import digest_prompt
from conserve_sdk._kind import Kind
from conserve_sdk._lineage import LineageBook
from conserve_sdk._prompts import PromptReader
from conserve_sdk.core.units import ConversationId

SCOPE = ConversationId("c")
KEYS = {Kind.CHAT: "messages", Kind.RESPONSES: "input", Kind.COMPLETIONS: "prompt"}

TEXTS = st.sampled_from(["", "a", "b", "ü", "\ud800", '"messages":[', "]", "},{", "\\", "x" * 40])
IMAGES = st.sampled_from(["data:image/png;base64,AA", "http://h/cat.png"]).map(
    lambda url: [{"type": "image_url", "image_url": {"url": url}}]
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]), "content": TEXTS | IMAGES},
    optional={"type": st.just("message"), "messages": st.just([])},
) | st.sampled_from([{"type": "function_call", "name": "f", "arguments": "{}"}, {"type": "system"}, 1, None, "x"])
OPTIONS = st.fixed_dictionaries(
    {"model": st.sampled_from(["m", "m", "m", "other", "", "no name"])},
    optional={
        "stream": st.booleans(),
        "n": st.sampled_from([1, 2]),
        "tools": st.sampled_from([[], [{"name": "t"}], [{"name": "t", "strict": 1}], [{"name": "t", "strict": True}]]),
        "instructions": TEXTS,
        "truncation": st.just("auto"),
        "kv_transfer_params": st.just({"do_remote_prefill": True}),
        "vllm_xargs": st.sampled_from([{}, {"kv_transfer_params": {}}]),
        "metadata": st.just({"messages": [1], "input": [2]}),
    },
)
STEPS = st.tuples(
    st.sampled_from(["extend", "extend", "again", "branch", "rewrite", "options", "shorter", "empty"]),
    st.lists(MESSAGES, max_size=3),
    OPTIONS,
    st.integers(0, 3),
)
KINDS = st.sampled_from(list(Kind))


def written(kind: Kind, messages: list[Any], options: dict[str, Any], *, at: int, style: int) -> bytes:
    """A body with its messages at any place among the options, written in one of several ways."""
    pairs = list(options.items())
    pairs.insert(min(at, len(pairs)), (KEYS[kind], messages))
    text = json.dumps(
        dict(pairs),
        ensure_ascii=style == 0,
        separators=(", ", ": ") if style == 2 else (",", ":"),
        indent=1 if style == 3 else None,
    )
    return text.encode("utf-8", "surrogatepass")


def bodies(kind: Kind, steps: list[Any], at: int, style: int) -> list[bytes]:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    options: dict[str, Any] = {"model": "m", "max_tokens": 8}
    made = [written(kind, messages, options, at=at, style=style)]
    for what, added, others, count in steps:
        if what in ("extend", "options"):
            messages = messages + added
        if what == "options":
            options = others
        if what == "branch":
            messages = messages[:-1] + added
        if what == "rewrite" and messages:
            messages = [{"role": "system", "content": f"now {count}"}, *messages[1:]]
        if what == "shorter":
            messages = messages[:count]
        if what == "empty":
            messages = []
        made.append(written(kind, messages, options, at=at, style=style))
    return made


def complaint_of(read: Callable[[], object]) -> str:
    try:
        read()
    except BadBody as bad:
        return str(bad)
    return ""


def assert_same(reader: PromptReader, kind: Kind, raw: bytes) -> None:
    complaint = complaint_of(lambda: read_body(kind, raw))
    assert complaint_of(lambda: reader.read(kind, raw, scope=SCOPE)) == complaint
    if complaint:
        return
    plain = read_body(kind, raw)
    read = reader.read(kind, raw, scope=SCOPE)
    assert read.digest == digest_prompt(kind, plain.data)
    for name in ("kind", "raw", "model", "stream", "stripped", "local_because", "data"):
        assert getattr(read.body, name) == getattr(plain, name), name
    assert prefill_leg(read.body, {"a": 1}) == prefill_leg(plain, {"a": 1})
    without = {key: value for key, value in plain.data.items() if key != KEYS[kind]}
    assert {key: value for key, value in read.body.options.items() if key != KEYS[kind]} == without


@given(KINDS, st.lists(STEPS, max_size=8), st.integers(0, 2), st.integers(0, 3))
def test_any_sequence_of_bodies_reads_as_it_would_alone(kind: Kind, steps: list[Any], at: int, style: int) -> None:
    reader = PromptReader()
    for raw in bodies(kind, steps, at, style):
        assert_same(reader, kind, raw)


@given(st.lists(STEPS, max_size=8), st.booleans())
def test_lineages_are_the_same(steps: list[Any], named: bool) -> None:
    """The decisions that follow: matches and commits of two books, one fed by each way of reading."""
    reader, plain_book, fast_book = PromptReader(), LineageBook(), LineageBook()
    conversation = SCOPE if named else None
    names: dict[str, str] = {}
    for raw in bodies(Kind.CHAT, steps, 0, 1):
        try:
            plain = digest_prompt(Kind.CHAT, read_body(Kind.CHAT, raw).data)
        except BadBody:
            continue
        fast = reader.read(Kind.CHAT, raw, scope=conversation).digest
        one, other = plain_book.match(conversation, plain), fast_book.match(conversation, fast)
        assert names.setdefault(one.conversation_id, other.conversation_id) == other.conversation_id
        assert [getattr(one, name) for name in _SHOWN] == [getattr(other, name) for name in _SHOWN]
        assert plain_book.commit(one, plain) == fast_book.commit(other, fast)


_SHOWN = ("lineage", "extends", "shared_items", "parent", "uncached_bytes", "append_bytes", "anonymous", "continued")


@given(st.binary(max_size=12), st.integers(0, 60), st.integers(0, 12))
def test_broken_bodies_are_told_apart_as_before(put_in: bytes, at: int, cut: int) -> None:
    reader = PromptReader()
    good = written(Kind.CHAT, [{"role": "user", "content": "hello"}], {"model": "m"}, at=0, style=1)
    reader.read(Kind.CHAT, good, scope=SCOPE)
    raw = good[: len(good) - at] + put_in + good[len(good) - at + cut :]
    assert_same(reader, Kind.CHAT, raw)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"messages":[1],}',
        b'{"messages":[1,],"model":"m"}',
        b'{"messages":[1],"messages":[2],"model":"m"}',
        b'{"messages":[1],"model":"m","\\u006dessages":[2]}',
        b'{"model":"m","x":{"messages":[1]}}',
        b'{"model":"m","x":"\\"messages\\":[1]"}',
        b'{,"messages":[1],"model":"m"}',
        b'{"model":"m" "messages":[1]}',
        b'{"model":"m","messages":[1]}x',
        b'{"model":"m","messages":[]}',
        b'{"model":"m","messages":{"a":[1]}}',
        b'{"model":"m","messages":[1}]',
        b'{"model":"m",\x0b"messages":[1]}',
        b'{"model":"m","messages"\x0b:[1]}',
        b'{"model":"m","messages":[NaN]}',
        b'\xef\xbb\xbf{"messages":[1],"model":"m"}',
        '{"messages":[1],"model":"m"}'.encode("utf-16"),
        '{"messages":[1],"model":"m"}'.encode("utf-16-le"),
        b'{"messages":["\xff"],"model":"m"}',
        b"[]",
        b"",
    ],
)
def test_odd_bodies(raw: bytes) -> None:
    reader = PromptReader()
    for _ in range(2):
        try:
            plain = read_body(Kind.CHAT, raw)
        except (BadBody, UnicodeDecodeError) as error:
            with pytest.raises(type(error)):
                reader.read(Kind.CHAT, raw, scope=SCOPE)
            return
        read = reader.read(Kind.CHAT, raw, scope=SCOPE)
        assert repr(read.body.data) == repr(plain.data)
        assert read.digest == digest_prompt(Kind.CHAT, plain.data)


@pytest.mark.parametrize("suffix", [b",]", b",,2]", b"]]", b",2,]", b",2]]", b" ,2]", b",2 ]", b"x]"])
def test_what_follows_a_known_prompt_is_checked(suffix: bytes) -> None:
    reader = PromptReader()
    reader.read(Kind.CHAT, b'{"messages":[1],"model":"m"}', scope=SCOPE)
    for rest in (b',"model":"m"}', b"}", b',"model":"m","n":2}', b",}", b'"model":"m"}'):
        assert_same(reader, Kind.CHAT, b'{"messages":[1' + suffix + rest)


def turns(count: int, *, size: int = 10) -> list[bytes]:
    messages = [{"role": "user", "content": f"{number} " + "x" * size} for number in range(count)]
    return [written(Kind.CHAT, messages[: number + 1], {"model": "m"}, at=0, style=1) for number in range(count)]


def test_only_what_was_added_is_digested(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    real = _prompts.extend_digest
    monkeypatch.setattr(_prompts, "extend_digest", lambda known, items: added.append(len(items)) or real(known, items))
    reader = PromptReader()
    for raw in turns(5):
        reader.read(Kind.CHAT, raw, scope=SCOPE)
    assert added == [1, 1, 1, 1]


def test_memory_is_bounded() -> None:
    reader = PromptReader(kept_bytes_max=10_000)
    for number in range(50):
        for raw in turns(3, size=500):
            reader.read(Kind.CHAT, raw, scope=ConversationId(f"c{number}"))
    assert 0 < reader.kept_bytes <= 10_000
    for number in range(50):
        reader.forget(ConversationId(f"c{number}"))
    assert reader.kept_bytes == 0


def test_a_conversation_keeps_the_newest_prompts_of_its_branches() -> None:
    reader = PromptReader()
    for number in range(40):
        raw = written(Kind.CHAT, [{"role": "user", "content": f"{number:02}"}], {"model": "m"}, at=0, style=1)
        reader.read(Kind.CHAT, raw, scope=SCOPE)
    assert reader.kept_bytes <= _prompts.PROMPTS_PER_SCOPE_MAX * len(raw)


def test_a_prompt_that_is_too_long_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_prompts, "PROMPT_BYTES_MAX", 100)
    reader = PromptReader()
    reader.read(Kind.CHAT, turns(1, size=200)[0], scope=SCOPE)
    assert reader.kept_bytes == 0
    reader.forget(SCOPE)

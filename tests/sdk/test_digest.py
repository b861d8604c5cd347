"""Prompt digests: equal digests exactly for equal prefixes, sizes that count text and not media."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk._digest import BLOCK_BYTES, PromptDigest, _canonical, digest_prompt
from conserve_sdk._kind import Kind

SYSTEM = {"role": "system", "content": "You are terse."}
USER = {"role": "user", "content": "What is 2+2?"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text()}),
    max_size=12,
)


def chat(*items, **body) -> PromptDigest:
    return digest_prompt(Kind.CHAT, {"model": "m", "messages": list(items), **body})


def completion(prompt, **body) -> PromptDigest:
    return digest_prompt(Kind.COMPLETIONS, {"model": "m", "prompt": prompt, **body})


def responses(given, **body) -> PromptDigest:
    return digest_prompt(Kind.RESPONSES, {"model": "m", "input": given, **body})


@given(messages, messages)
def test_extends_is_the_prefix_relation(one: list, two: list) -> None:
    digest, head = chat(*one), chat(*two).head
    assert digest.extends(head) == (one[: len(two)] == two)
    shared = next(
        (i for i, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), min(len(one), len(two))
    )
    assert digest.shared_items(head) == 1 + shared  # the preamble is the first item


@given(st.text(), st.text(), st.integers(0, 3))
def test_extends_is_the_prefix_relation_of_prompt_strings(common: str, rest: str, blocks: int) -> None:
    base = "x" * (BLOCK_BYTES * blocks) + common
    assert completion(base + rest).extends(completion(base).head)
    assert completion(base).extends(completion(base + rest).head) == (rest == "")
    assert not completion("y" + base + rest).extends(completion(base + "z").head)


@pytest.mark.parametrize("length", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES])
def test_prompt_strings_around_block_boundaries(length: int) -> None:
    text = "".join(chr(97 + i % 26) for i in range(length))
    digest = completion(text)
    assert digest.text_bytes == length
    assert completion(text + "more").extends(digest.head)
    assert digest.extends(digest.head)
    assert digest.shared_items(digest.head) == digest.items == digest.head.items
    if length:
        assert not completion(text[:-1] + "\x00" + "more").extends(digest.head)
        assert not completion(text[:-1]).extends(digest.head)


def test_token_prompts_extend_by_whole_tokens() -> None:
    assert completion([1, 2, 3, 4]).extends(completion([1, 2, 3]).head)
    assert not completion([1, 2, 4, 4]).extends(completion([1, 2, 3]).head)
    assert not completion([1, 2, 3]).extends(completion("123").head)
    assert completion([1, 2, 3]).text_bytes == 12


@pytest.mark.parametrize("prompt", [["a", "b"], [[1, 2], [3]], [], None, [True], [-1]])
def test_other_prompts_match_only_themselves(prompt: object) -> None:
    assert completion(prompt).extends(completion(prompt).head)
    assert not completion(["other"]).extends(completion(prompt).head)


def test_the_order_of_keys_does_not_matter() -> None:
    turned = {"content": USER["content"], "role": "user"}
    assert (
        chat(SYSTEM, USER, tools=TOOLS).head
        == digest_prompt(Kind.CHAT, {"tools": TOOLS, "messages": [SYSTEM, turned], "model": "m"}).head
    )


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"tools": TOOLS},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"cache_salt": "tenant"},
        {"documents": [{"text": "x"}]},
        {"reasoning_effort": "high"},
    ],
)
def test_what_the_template_sees_separates(change: dict) -> None:
    assert chat(SYSTEM, USER, **change).shared_items(chat(SYSTEM, USER).head) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.5},
        {"max_tokens": 7},
        {"stream": True},
        {"tool_choice": "required"},
        {"tools": []},
        {"tools": None},
        {"response_format": {"type": "json_object"}},
        {"user": "u"},
    ],
)
def test_what_the_template_does_not_see_does_not_separate(change: dict) -> None:
    assert chat(SYSTEM, USER, **change).head == chat(SYSTEM, USER).head


def test_kinds_never_meet() -> None:
    items = [USER]
    assert responses(items).shared_items(chat(*items).head) == 0
    assert completion(json.dumps(items)).shared_items(chat(*items).head) == 0


def test_a_bare_string_is_one_user_message_of_the_responses_api() -> None:
    first = responses("hi")
    follow_up = responses([{"type": "message", "role": "user", "content": "hi"}, {"type": "reasoning", "id": "r"}])
    assert follow_up.extends(first.head)
    assert not responses("hi", instructions="be kind").extends(first.head)


@pytest.mark.parametrize("broken", [None, "text", 7, {"role": "user"}])
def test_wrong_types_are_digested_as_they_are(broken: object) -> None:
    for kind, key in ((Kind.CHAT, "messages"), (Kind.RESPONSES, "input"), (Kind.COMPLETIONS, "prompt")):
        digest = digest_prompt(kind, {"model": "m", key: broken})
        assert digest.extends(digest.head)


def test_lone_surrogates_are_no_obstacle() -> None:
    assert chat({"role": "user", "content": "\ud800"}).text_bytes > 0
    assert completion("\ud800").text_bytes == 3


def test_opening_ends_with_the_first_message_that_is_not_the_systems() -> None:
    developer = {"role": "developer", "content": "d"}
    assert chat(SYSTEM, developer, USER, USER).opening_items == 4
    assert chat(USER, SYSTEM).opening_items == 2
    assert chat(SYSTEM).opening_items == 2
    assert chat().opening_items == 1


def test_text_bytes_count_utf8_and_leave_media_out() -> None:
    short, long = chat({"role": "user", "content": "é" * 10}), chat({"role": "user", "content": "é" * 110})
    assert long.text_bytes - short.text_bytes == 200
    words = {"type": "text", "text": "what is this?"}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
    with_picture = chat({"role": "user", "content": [words, picture]})
    assert with_picture.text_bytes < 500
    other = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "B" * 10_000}}
    assert not chat({"role": "user", "content": [words, other]}).extends(with_picture.head)


def test_bytes_beyond_counts_what_follows() -> None:
    digest = chat(SYSTEM, USER)
    assert digest.bytes_beyond(0) == digest.text_bytes
    assert digest.bytes_beyond(digest.items) == 0
    assert digest.bytes_beyond(2) == digest.text_bytes - chat(SYSTEM).text_bytes


def test_repr_shows_no_text() -> None:
    assert repr(completion("secret")) == "PromptDigest(kind='completions', items=2, text_bytes=6)"
    assert b"secret" not in completion("secret").head.tail


def test_the_prefix_key_names_tools_and_system_prompt_alone() -> None:
    def key(**body: object) -> str | None:
        return digest_prompt(Kind.CHAT, {"model": "m", **body}).prefix_key

    system, question = {"role": "system", "content": "s" * 600}, {"role": "user", "content": "q"}
    shared = key(messages=[system, question])
    assert shared is not None
    assert len(shared) <= 256
    assert key(messages=[system, {"role": "user", "content": "other" * 500}]) == shared
    assert key(messages=[system]) == shared
    assert key(messages=[system, question], tools=[{"type": "function"}]) not in (None, shared)
    assert key(messages=[{**system, "content": "t" * 600}, question]) not in (None, shared)
    assert key(messages=[{**system, "content": "short"}, question]) is None
    assert key(messages=[{"role": "user", "content": "q" * 900}]) is None
    assert digest_prompt(Kind.COMPLETIONS, {"prompt": "p" * 5000}).prefix_key is None


@given(st.fixed_dictionaries({"role": st.text(), "content": st.text()}))
def test_a_plain_message_is_written_as_any_other(message) -> None:
    text = json.dumps(message, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    assert _canonical(message) == _canonical(dict(reversed(message.items()))) == text.encode("utf-8", "surrogatepass")

"""Lineages by content: growing prefixes keep their lineage whatever else happens; a change in the middle forks."""

import os
import threading
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk._lineage import Kind, LineageBook, LineageMatch, PromptDigest, digest_prompt
from conserve_sdk.core.units import ConversationId, LineageId

SYSTEM = {"role": "system", "content": "You are terse."}
C = ConversationId("c")

_serial = count()


def said(text: str, role: str = "user") -> dict:
    return {"role": role, "content": text}


def chat(*items, **body) -> PromptDigest:
    return digest_prompt(Kind.CHAT, {"model": "m", "messages": list(items), **body})


def serve(book: LineageBook, conversation: ConversationId | None, digest: PromptDigest, **options) -> LineageMatch:
    response_id = options.pop("response_id", None)
    match = book.match(conversation, digest, **options)
    book.commit(match, digest, response_id)
    return match


texts = st.text(alphabet="ab", max_size=3)
histories = st.lists(texts.map(said), min_size=2, max_size=10)


@st.composite
def growing_histories(draw):
    """A history and the lengths at which it was sent, one request each."""
    history = draw(histories)
    lengths = sorted(draw(st.sets(st.integers(1, len(history)), min_size=1)))
    return [history[:length] for length in lengths]


class TestProperties:
    @given(growing_histories())
    def test_an_extended_conversation_always_matches_its_lineage(self, requests: list) -> None:
        book = LineageBook()
        first, *others = [serve(book, C, chat(SYSTEM, *request)) for request in requests]
        assert (first.extends, first.parent) == (False, None)
        for request, match in zip(requests[1:], others, strict=True):
            assert (match.extends, match.lineage) == (True, first.lineage)
            assert match.shared_items >= 3
            assert match.uncached_bytes < chat(SYSTEM, *request).text_bytes

    @given(growing_histories(), st.data())
    def test_a_changed_earlier_message_never_matches(self, requests: list, data) -> None:
        book = LineageBook()
        for request in requests:
            serve(book, C, chat(SYSTEM, *request))
        changed = list(requests[-1])
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place] = said(changed[place]["content"] + "!")
        match = book.match(C, chat(SYSTEM, *changed, said("more")))
        assert not match.extends
        assert match.shared_items == place + 2
        assert match.parent is not None
        assert match.parent != match.lineage

    @given(st.lists(growing_histories(), min_size=2, max_size=4), st.randoms(use_true_random=False))
    def test_the_order_of_interleaved_conversations_does_not_matter(self, scripts: list, random) -> None:
        one_by_one, interleaved = LineageBook(), LineageBook()
        expected = [
            [serve(one_by_one, ConversationId(f"c{i}"), chat(*request)) for request in script]
            for i, script in enumerate(scripts)
        ]
        order = [i for i, script in enumerate(scripts) for _ in script]
        random.shuffle(order)
        queues = [iter(script) for script in scripts]
        got: list[list[LineageMatch]] = [[] for _ in scripts]
        for i in order:
            got[i].append(serve(interleaved, ConversationId(f"c{i}"), chat(*next(queues[i]))))
        assert got == expected

    @given(growing_histories())
    def test_another_process_names_the_same_lineage(self, requests: list) -> None:
        first = serve(LineageBook(), C, chat(SYSTEM, *requests[0]))
        elsewhere = LineageBook().match(C, chat(SYSTEM, *requests[-1]))
        assert elsewhere.lineage == first.lineage
        assert not elsewhere.extends  # it does not know; the broker's answer tells that the lease lives

    @given(growing_histories())
    def test_anonymous_conversations_are_found_by_content(self, requests: list) -> None:
        book = LineageBook()
        matches = [serve(book, None, chat(SYSTEM, *request)) for request in requests]
        assert len({(match.conversation_id, match.lineage) for match in matches}) == 1
        assert all(match.anonymous for match in matches)
        assert [match.extends for match in matches] == [False] + [True] * (len(matches) - 1)

    @given(st.text(alphabet="ab", min_size=1, max_size=4), st.lists(st.text(alphabet="ab", min_size=1), max_size=4))
    def test_growing_prompt_strings(self, prompt: str, additions: list[str]) -> None:
        book = LineageBook()
        known = [serve(book, conversation, complete(prompt)) for conversation in (C, None)]
        for addition in additions:
            prompt += addition * 400
            for conversation, first in zip((C, None), known, strict=True):
                match = serve(book, conversation, complete(prompt))
                assert match.extends
                assert (match.conversation_id, match.lineage) == (first.conversation_id, first.lineage)


def complete(prompt: str) -> PromptDigest:
    return digest_prompt(Kind.COMPLETIONS, {"model": "m", "prompt": prompt})


class TestForks:
    def test_the_same_prompt_again_is_the_same_turn_again(self) -> None:
        book = LineageBook()
        first = serve(book, C, chat(SYSTEM, said("a")))
        again = book.match(C, chat(SYSTEM, said("a")))
        assert (again.extends, again.lineage, again.uncached_bytes) == (True, first.lineage, 0)

    def test_going_back_to_a_shorter_prompt_stays_in_the_lineage(self) -> None:
        book = LineageBook()
        first = serve(book, C, chat(SYSTEM, said("a"), said("b"), said("c")))
        back = serve(book, C, chat(SYSTEM, said("a")))
        assert (back.extends, back.lineage, back.uncached_bytes) == (True, first.lineage, 0)
        other_way = book.match(C, chat(SYSTEM, said("a"), said("z")))
        assert (other_way.extends, other_way.lineage) == (True, first.lineage)
        assert book.match(C, chat(SYSTEM, said("a"), said("b"), said("c"), said("d"))).extends

    def test_branches_that_ran_at_the_same_time_both_go_on(self) -> None:
        book = LineageBook()
        first = serve(book, C, chat(said("a")))
        branches = [chat(said("a"), said("left")), chat(said("a"), said("right"))]
        for match, digest in [(book.match(C, digest), digest) for digest in branches]:
            assert match.extends
            book.commit(match, digest)
        for side in ("left", "right"):
            match = serve(book, C, chat(said("a"), said(side), said("on")))
            assert (match.extends, match.lineage) == (True, first.lineage)

    def test_a_fork_gets_a_lineage_of_its_own_and_both_go_on(self) -> None:
        book = LineageBook()
        main = serve(book, C, chat(SYSTEM, said("a"), said("b"), said("c")))
        fork = serve(book, C, chat(SYSTEM, said("a"), said("B"), said("c")))
        assert (fork.extends, fork.parent, fork.shared_items) == (False, main.lineage, 3)
        assert fork.lineage.startswith(f"{main.lineage}-")
        assert book.match(C, chat(SYSTEM, said("a"), said("B"), said("c"), said("d"))).lineage == fork.lineage
        assert book.match(C, chat(SYSTEM, said("a"), said("b"), said("c"), said("d"))).lineage == main.lineage

    def test_a_stranger_names_the_most_recent_lineage_as_its_parent(self) -> None:
        book = LineageBook()
        serve(book, C, chat(SYSTEM, said("a")))
        recent = serve(book, C, chat(SYSTEM, said("b"), tools=[{"type": "function"}]))
        stranger = book.match(C, chat(said("summarise"), chat_template="t"))
        assert (stranger.extends, stranger.shared_items, stranger.parent) == (False, 0, recent.lineage)

    def test_the_closest_lineage_is_the_parent(self) -> None:
        book = LineageBook()
        close = serve(book, C, chat(SYSTEM, said("a"), said("b")))
        serve(book, C, chat(SYSTEM, said("other")))
        assert book.match(C, chat(SYSTEM, said("a"), said("x"))).parent == close.lineage

    def test_the_longest_extended_lineage_wins(self) -> None:
        book = LineageBook()
        serve(book, C, chat(said("a")), explicit_lineage=LineageId("short"))
        serve(book, C, chat(said("a"), said("b")), explicit_lineage=LineageId("long"))
        assert book.match(C, chat(said("a"), said("b"), said("c"))).lineage == "long"

    def test_an_explicit_lineage_is_taken_as_named(self) -> None:
        book = LineageBook()
        named = LineageId("planner")
        assert not serve(book, C, chat(said("a")), explicit_lineage=named).extends
        match = serve(book, C, chat(said("a"), said("b")), explicit_lineage=named)
        assert (match.lineage, match.extends) == (named, True)
        rewritten = serve(book, C, chat(said("z")), explicit_lineage=named)
        assert (rewritten.lineage, rewritten.extends) == (named, False)


class TestResponses:
    def test_a_named_predecessor_continues_its_lineage(self) -> None:
        book = LineageBook()
        whole = digest_prompt(Kind.RESPONSES, {"model": "m", "input": "hi"})
        part = digest_prompt(Kind.RESPONSES, {"model": "m", "input": "and now?"})
        for conversation in (C, None):
            first = serve(book, conversation, whole, response_id=f"r1-{conversation}")
            second = serve(
                book, conversation, part, previous_response_id=f"r1-{conversation}", response_id=f"r2-{conversation}"
            )
            third = book.match(conversation, part, previous_response_id=f"r2-{conversation}")
            for match in (second, third):
                assert (match.conversation_id, match.lineage) == (first.conversation_id, first.lineage)
                assert match.extends
                assert match.continued
                assert match.anonymous == first.anonymous
            assert book.match(conversation, whole).lineage == first.lineage  # its head was not replaced by a part
            assert not book.match(conversation, part).extends  # and a part alone is no prefix of anything

    def test_an_unknown_or_foreign_predecessor_counts_by_content(self) -> None:
        book = LineageBook()
        part = digest_prompt(Kind.RESPONSES, {"model": "m", "input": "hi"})
        serve(book, C, part, response_id="r1")
        assert not book.match(ConversationId("other"), part, previous_response_id="r1").continued
        assert not book.match(C, part, previous_response_id="unknown").continued

    def test_forgotten_with_the_conversation(self) -> None:
        book = LineageBook()
        part = digest_prompt(Kind.RESPONSES, {"model": "m", "input": "hi"})
        serve(book, C, part, response_id="r1")
        book.forget(C)
        match = book.match(C, part, previous_response_id="r1")
        assert (match.extends, match.continued) == (False, False)


class TestBounds:
    def test_the_least_recently_used_conversation_goes_first(self) -> None:
        book = LineageBook(conversations_max=2)
        for name in ("a", "b"):
            serve(book, ConversationId(name), chat(said("x")), response_id=name)
        serve(book, ConversationId("a"), chat(said("x")))
        serve(book, ConversationId("c"), chat(said("x")), response_id="c")
        known = {name: book.match(ConversationId(name), chat(said("x"))).extends for name in "abc"}
        assert known == {"a": True, "b": False, "c": True}

    def test_the_least_recently_used_lineage_and_head_go_first(self) -> None:
        book = LineageBook(lineages_max=2, heads_max=2)
        for text in "abc":
            serve(book, C, chat(said(text)))
        assert [book.match(C, chat(said(text))).extends for text in "abc"] == [False, True, True]
        branches = [chat(said("c"), said(side)) for side in "xyz"]
        for match, digest in [(book.match(C, digest), digest) for digest in branches]:
            book.commit(match, digest)
        assert [book.match(C, chat(said("c"), said(s), said("on"))).extends for s in "xyz"] == [False, True, True]

    @pytest.mark.parametrize("digests", [[chat(said("a"), said(s)) for s in "xyz"], [complete(s) for s in "xyz"]])
    def test_nothing_of_a_forgotten_anonymous_conversation_is_left(self, digests: list[PromptDigest]) -> None:
        book = LineageBook(conversations_max=2, heads_max=1)
        for digest in digests:
            first = serve(book, None, digest)
            assert serve(book, None, digest).conversation_id == first.conversation_id
        assert not book.match(None, digests[0]).extends
        assert book.match(None, digests[2]).extends
        for digest in digests[1:]:
            book.forget(book.match(None, digest).conversation_id)
        assert book._anonymous_ends == {}
        assert not book._conversations

    def test_evicted_lineages_of_an_anonymous_conversation_are_not_found_again(self) -> None:
        book = LineageBook(lineages_max=1)
        first = serve(book, None, chat(said("a")), explicit_lineage=LineageId("one"))
        digest = chat(said("a"), said("b"))
        book.commit(LineageMatch(**{**_fields(first), "lineage": LineageId("two")}), digest)
        assert not book.match(None, chat(said("a"))).extends
        assert book.match(None, digest).conversation_id == first.conversation_id

    def test_a_growing_anonymous_conversation_is_indexed_by_its_last_prompt_only(self) -> None:
        book = LineageBook()
        for length in range(1, 6):
            serve(book, None, chat(*map(said, "abcde"[:length])))
        assert len(book._anonymous_ends) == 1

    def test_anonymous_strangers_do_not_share_a_conversation(self) -> None:
        book = LineageBook()
        ids = {serve(book, None, chat(SYSTEM, said(str(next(_serial))))).conversation_id for _ in range(50)}
        assert len(ids) == 50

    def test_forgetting_the_unknown_is_quiet(self) -> None:
        LineageBook().forget(ConversationId("nobody"))


def _fields(match: LineageMatch) -> dict:
    return {name: getattr(match, name) for name in LineageMatch.__slots__}


def test_many_threads_each_keep_their_lineage() -> None:
    book = LineageBook()
    wrong: list[str] = []

    def talk(name: str) -> None:
        history, lineages = [SYSTEM], set()
        for turn in range(30):
            history.append(said(f"{name} {turn}"))
            match = serve(book, ConversationId(name), chat(*history))
            lineages.add(match.lineage)
            if match.extends != (turn > 0) or len(lineages) > 1:
                wrong.append(f"{name} turn {turn}")

    threads = [threading.Thread(target=talk, args=(f"c{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_with_an_empty_book_even_if_the_lock_was_held(fork_and_wait) -> None:
    book = LineageBook()
    digest = chat(said("a"))
    first = serve(book, C, digest)

    def child() -> None:
        match = book.match(C, digest)
        assert not match.extends
        assert match.lineage == first.lineage

    with book._lock:  # as if another thread were inside
        assert fork_and_wait(child) == 0
    assert book.match(C, digest).extends

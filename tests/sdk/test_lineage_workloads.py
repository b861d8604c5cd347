"""Which lineages the usual agent workloads have, message by message, and what the broker is told about them."""

from __future__ import annotations

import json
import logging

import pytest

from conserve_sdk._lineage import Kind, LineageBook, digest_prompt
from conserve_sdk.core.units import ConversationId
from conserve_sdk.testing import EngineReply, ScriptedEngine

C = ConversationId("thread-1")
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def call(number: int) -> dict:
    function = {"name": "search", "arguments": f'{{"q": {number}}}'}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": f"c{number}", "type": "function", "function": function}],
    }


def result(number: int, text: str = "found " * 50) -> dict:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


class Thread:
    """One conversation whose requests are served at once, or begun together."""

    def __init__(self) -> None:
        self.book = LineageBook()
        self.rewrites = []

    def ask(self, *messages: dict, **body):
        return self.ask_together([messages], **body)[0]

    def ask_together(self, requests, **body):
        digests = [digest_prompt(Kind.CHAT, {"model": "m", "messages": list(r), **body}) for r in requests]
        matches = [self.book.match(C, digest) for digest in digests]
        for match, digest in zip(matches, digests, strict=True):
            for _ in range(2):  # at its first byte, and again at its end
                self.rewrites.append(self.book.commit(match, digest))
        return matches

    @property
    def rewritten(self) -> list:
        return [rewrite for rewrite in self.rewrites if rewrite]


@pytest.fixture
def thread() -> Thread:
    return Thread()


def lineages(matches) -> int:
    return len({match.lineage for match in matches})


def test_a_tool_loop_over_three_user_turns_is_one_lineage(thread: Thread) -> None:
    history, matches = [system("You are helpful.")], []
    for turn in range(3):
        history.append(user(f"question {turn}"))
        matches.append(thread.ask(*history, tools=TOOLS))
        history += [call(turn), result(turn)]
        matches.append(thread.ask(*history, tools=TOOLS))
        history.append(assistant(f"answer {turn}"))
    assert (len(matches), lineages(matches)) == (6, 1)
    assert [match.extends for match in matches] == [False] + [True] * 5
    assert thread.rewritten == []


def test_a_supervisor_and_its_worker_are_two_lineages_that_share_nothing(thread: Thread) -> None:
    """An agent as a tool: the worker is called from inside the supervisor's tool call, with a prompt of its own."""
    boss, worker, seen = [system("You delegate.")], [system("You work.")], []
    for turn in range(2):
        boss.append(user(f"task {turn}"))
        seen.append(("boss", thread.ask(*boss, tools=TOOLS)))
        worker.append(user(f"subtask {turn}"))
        seen.append(("worker", thread.ask(*worker)))
        worker.append(assistant("done"))
        boss += [call(turn), result(turn, "done")]
        seen.append(("boss", thread.ask(*boss, tools=TOOLS)))
    by_agent = {agent: [match for name, match in seen if name == agent] for agent in ("boss", "worker")}
    assert {agent: lineages(matches) for agent, matches in by_agent.items()} == {"boss": 1, "worker": 1}
    first = by_agent["worker"][0]
    assert (first.extends, first.shared_items, first.parent) == (False, 0, by_agent["boss"][0].lineage)
    assert by_agent["worker"][1].extends
    assert thread.rewritten == []


def test_workers_that_start_afresh_each_time_are_new_lineages_and_no_mistake(thread: Thread) -> None:
    boss = thread.ask(system("You delegate."), user("task"), tools=TOOLS)
    workers = [thread.ask(system("You work."), user(f"subtask {number}")) for number in range(12)]
    assert lineages([boss, *workers]) == 13
    assert {match.replaces for match in workers} == {None}
    assert thread.rewritten == []


@pytest.mark.parametrize("together", [True, False])
def test_a_fan_out_of_three_is_three_lineages_that_share_the_system_prompt(thread: Thread, together: bool) -> None:
    requests = [(system("You check one item."), user(f"item {number}")) for number in range(3)]
    matches = thread.ask_together(requests) if together else [thread.ask(*request) for request in requests]
    assert lineages(matches) == 3
    assert {match.replaces for match in matches} == {None}
    if not together:
        assert [match.shared_items for match in matches] == [0, 2, 2]  # the preamble and the system prompt
    for request, match in zip(requests, matches, strict=True):
        again = thread.ask(*request, assistant("hm"), user("sure?"))
        assert (again.lineage, again.extends) == (match.lineage, True)


def test_a_fan_out_over_one_history_stays_in_its_lineage_and_every_branch_goes_on(thread: Thread) -> None:
    history = [system("You plan."), user("plan")]
    trunk = thread.ask(*history)
    branches = thread.ask_together([(*history, assistant("ok"), user(f"branch {number}")) for number in range(3)])
    assert {match.lineage for match in branches} == {trunk.lineage}
    assert all(match.extends for match in branches)
    deeper = [(*history, assistant("ok"), user(f"branch {number}"), assistant("a"), user("b")) for number in range(3)]
    assert all(match.extends and match.append_bytes < 100 for match in thread.ask_together(deeper))


def test_planner_and_actor_on_one_state_are_one_lineage(thread: Thread) -> None:
    state, matches = [system("You plan, then act."), user("go")], []
    for step in range(3):
        matches.append(thread.ask(*state, tools=TOOLS))  # the planner's node
        state.append(assistant(f"plan {step}"))
        matches.append(thread.ask(*state, tools=TOOLS))  # the actor's node
        state += [call(step), result(step)]
    assert lineages(matches) == 1
    assert [match.extends for match in matches] == [False] + [True] * 5


def test_summarisation_makes_a_stranger_and_then_a_fork_of_the_history(thread: Thread) -> None:
    history = [system("You are helpful."), user("first")]
    main = thread.ask(*history, tools=TOOLS)
    for turn in range(4):
        history += [assistant(f"answer {turn} " * 20), user(f"next {turn}")]
        assert thread.ask(*history, tools=TOOLS).lineage == main.lineage
    stranger = thread.ask(user(f"Summarise: {history}"))
    assert (stranger.extends, stranger.shared_items, stranger.parent) == (False, 0, main.lineage)
    compacted = [history[0], user("Summary: much was said."), *history[-3:]]
    fork = thread.ask(*compacted, tools=TOOLS)
    assert (fork.extends, fork.shared_items, fork.parent) == (False, 2, main.lineage)  # tools and system prompt remain
    assert fork.lineage not in (main.lineage, stranger.lineage)
    assert (main.replaces, stranger.replaces, fork.replaces) == (None, None, main.lineage)
    assert thread.ask(*compacted, assistant("well"), user("on"), tools=TOOLS).lineage == fork.lineage
    assert thread.rewritten == []


def test_context_editing_forks_where_it_cuts_and_keeps_what_stands_before(thread: Thread) -> None:
    history, forks = [system("You are helpful."), user("look")], []
    thread.ask(*history, tools=TOOLS)
    for number in range(7):
        history += [call(number), result(number)]
        sent = [{**m, "content": "[cleared]"} if m["role"] == "tool" and m is not history[-1] else m for m in history]
        match = thread.ask(*sent, tools=TOOLS)
        if not match.extends:
            forks.append(match)
    # The result before last is replaced each time: everything up to it is kept.
    assert [fork.shared_items for fork in forks] == [4, 6, 8, 10, 12, 14]
    assert all(fork.replaces == fork.parent for fork in forks)
    assert thread.rewritten[0] == (11, "tool")  # the fifth of them is one too many


def test_a_handoff_is_a_lineage_of_its_own_and_going_back_finds_the_first(thread: Thread) -> None:
    said = [user("my bill is wrong")]
    triage = thread.ask(system("You route."), *said, tools=TOOLS)
    said += [call(0), result(0, "transferred to billing")]
    billing = thread.ask(system("You do billing."), *said)
    assert (billing.extends, billing.parent, billing.replaces) == (False, triage.lineage, None)
    said += [assistant("fixed"), user("thanks, another thing")]
    assert thread.ask(system("You do billing."), *said).lineage == billing.lineage
    assert thread.ask(system("You route."), *said, tools=TOOLS).lineage == triage.lineage
    assert thread.rewritten == []


def test_a_round_of_agents_over_one_history_is_no_rewriting(thread: Thread) -> None:
    said = [user("discuss")]
    for turn in range(20):
        assert thread.ask(system(f"You are agent {turn % 5}."), *said).replaces is None
        said.append(assistant(f"agent {turn % 5} says {turn}"))
    assert thread.rewritten == []


@pytest.mark.parametrize("role", ["system", "developer", "user"])
def test_a_clock_in_the_prompt_never_finds_its_prefix_and_is_named(thread: Thread, role: str) -> None:
    said, matches = [user("hi")], []
    for turn in range(8):
        matches.append(thread.ask({"role": role, "content": f"It is 10:0{turn}."}, *said, tools=TOOLS))
        said += [assistant("hello"), user("and now?")]
        if turn < 5:
            assert thread.rewritten == []
    assert lineages(matches) == 8
    assert [match.shared_items for match in matches] == [0] + [1] * 7  # the block of tools at best
    assert set(thread.rewritten) == {(0, role)}


def test_fresh_context_in_the_first_question_is_named_too(thread: Thread) -> None:
    said: list[dict] = []
    for turn in range(7):
        thread.ask(system("You are helpful."), user(f"context of turn {turn}"), *said, user(f"question {turn}"))
        said += [user(f"question {turn}"), assistant("answer")]
    assert set(thread.rewritten) == {(1, "user")}


def test_turns_that_go_on_make_up_for_forks(thread: Thread) -> None:
    """A prompt that changes once a minute is rebuilt once a minute: that is what its author asked for."""
    said = [user("hi")]
    for turn in range(30):
        thread.ask(system(f"It is minute {turn // 3}."), *said)
        said += [assistant("hello"), user("and now?")]
    assert thread.rewritten == []


def test_what_the_model_wrote_is_no_append(thread: Thread) -> None:
    history = [system("s"), user("u")]
    thread.ask(*history)
    answer, more = assistant("a" * 5_000), result(0, "t" * 700)
    match = thread.ask(*history, answer, more)
    assert match.uncached_bytes > 5_700
    assert 700 < match.append_bytes < 800
    response_items = [{"type": "reasoning", "summary": "r" * 900}, {"type": "function_call", "arguments": "x" * 900}]
    items = [{"role": "user", "content": "u"}]
    book = LineageBook()
    for sent in (items, [*items, *response_items, {"type": "function_call_output", "output": "o" * 300}]):
        digest = digest_prompt(Kind.RESPONSES, {"model": "m", "input": sent})
        match = book.match(C, digest)
        book.commit(match, digest)
    assert 300 < match.append_bytes < 400


@pytest.mark.parametrize("messages", [["text"], [{"role": 7}], [{}], [None], [{"role": "x" * 100}]])
def test_messages_of_any_shape_have_a_role(messages) -> None:
    digest = digest_prompt(Kind.CHAT, {"model": "m", "messages": messages})
    assert len(digest.roles) == 1
    assert len(digest.roles[0]) <= 32


# ---- what the broker and the log are told ---------------------------------------------------------------------


def leases_asked(world) -> list[dict]:
    return [json.loads(e.request) for e in world.broker.exchanges if e.path == "/v1/leases"]


BOSS = [system("You delegate. " * 40), user("task " * 100)]
WORKER = [system("You work. " * 40), user("subtask " * 100)]


def test_a_child_names_its_parents_lease_and_hints_at_its_decoder(world) -> None:
    world.turn(messages=BOSS)
    world.turn(messages=WORKER)
    parent, child = leases_asked(world)
    assert (parent["parent_lease_id"], parent["hint_engine_id"]) == (None, None)
    assert child["parent_lease_id"] == world.turns.records[0].lease_id
    assert child["hint_engine_id"] == world.turns.records[0].decoder_id
    assert parent["lineage"] != child["lineage"]


def test_conversations_under_one_system_prompt_name_it(world) -> None:
    world.turn(messages=BOSS)
    world.turn(messages=WORKER)
    world.turn(messages=[BOSS[0], user("quite another task " * 100)])
    boss, worker, other = (asked["prefix_key"] for asked in leases_asked(world))
    assert boss == other
    assert worker not in (None, boss)


def test_a_fork_names_the_lineage_it_left(world) -> None:
    world.turn(messages=WORKER)
    world.turn(messages=BOSS)
    fork = [BOSS[0], user("summary " * 150), assistant("ok"), user("on")]
    world.turn(messages=fork)
    *_, asked = leases_asked(world)
    assert asked["parent_lease_id"] == world.turns.records[1].lease_id
    assert asked["hint_engine_id"] == world.turns.records[1].decoder_id


def test_a_parent_whose_lease_has_ended_is_not_named(world) -> None:
    world.turn(messages=BOSS)
    world.clock.advance(61_000)
    world.turn(messages=WORKER)
    *_, asked = leases_asked(world)
    assert (asked["parent_lease_id"], asked["hint_engine_id"]) == (None, None)


def test_one_warning_that_names_the_place_and_never_the_content(world, caplog) -> None:
    for name in ("a", "b"):
        said = [user("a secret question " * 60)]
        for turn in range(8):
            world.turn(messages=[system(f"The secret time is {turn}."), *said], conversation_id=name)
            said += [assistant("a secret answer"), user("a secret wish")]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    (warning,) = [text for text in warnings if "starts over" in text]
    assert "your system prompt changes each turn, first at message 0 (role 'system')" in warning
    assert warning.startswith("conversation a ")
    assert "secret" not in caplog.text


def test_an_edited_history_is_told_from_a_changed_system_prompt(world, caplog) -> None:
    history = [*BOSS]
    for number in range(8):
        history += [call(number), result(number)]
        sent = [{**m, "content": "[cleared]"} if m["role"] == "tool" and m is not history[-1] else m for m in history]
        world.turn(messages=sent)
    assert "what was said before changes from turn to turn, first at message 11 (role 'tool')" in caplog.text


# ---- a cache that was lost ------------------------------------------------------------------------------------


def answers(*replies: EngineReply) -> ScriptedEngine:
    return ScriptedEngine(then="answer").script("d0", *replies)


def reply(prompt_tokens: int, cached_tokens: int | None) -> EngineReply:
    if cached_tokens is not None:
        return EngineReply.chat(prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 5, "prompt_tokens_details": None}
    choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
    head = {"id": "1", "object": "chat.completion", "created": 0, "model": "test-model"}
    return EngineReply.json({**head, "choices": [choice], "usage": usage})


@pytest.mark.parametrize(
    ("before", "after", "loss"),
    [
        (reply(2_000, 0), reply(2_050, 0), "cache_lost"),
        (reply(2_000, 0), reply(2_050, 800), "cache_lost"),
        (reply(2_000, 0), reply(2_050, 1_900), ""),
        (reply(2_000, 0), reply(2_050, 1_000), ""),  # half of it: a template that drops what was thought
        (reply(2_000, 0), reply(2_050, None), ""),  # does not say
        (reply(200, 0), reply(250, 0), ""),  # may all be in a block that was not full
        (reply(2_000, None), reply(2_050, 0), "cache_lost"),
    ],
)
def test_a_follow_up_that_finds_no_cache_is_counted(make_world, before, after, loss) -> None:
    world = make_world(engine=answers(before, after))
    for turns in range(2):
        said = [message for _ in range(turns) for message in (assistant("ok"), user("more"))]
        assert world.turn(messages=[*BOSS, *said]).text == "ok"
    assert (world.record.loss, world.turns.records[0].loss) == (loss, "")
    assert world.reports("turn_finished")[-1]["cached_tokens"] == world.record.cached_tokens


def test_only_what_the_prompt_shares_is_missed(make_world) -> None:
    """A branch that goes on from far back finds what it shares, which is not much."""
    long = [*BOSS, assistant("a"), user("text " * 4_000)]
    world = make_world(engine=answers(reply(400, 0), reply(5_000, 384), reply(5_000, 384)))
    world.turn(messages=BOSS)
    for last in (long, [*BOSS, assistant("b"), user("other " * 4_000)]):
        world.turn(messages=last)
    assert world.record.loss == ""


def test_a_first_turn_has_no_cache_to_lose(make_world) -> None:
    world = make_world(engine=answers(reply(2_000, 0), reply(2_000, 0)))
    world.turn(messages=BOSS)
    world.clock.advance(61_000)  # the lease ends, and with it the decoder's promise
    world.turn(messages=[*BOSS, assistant("ok"), user("more")])
    assert (world.record.first_turn, world.record.loss) == (True, "")

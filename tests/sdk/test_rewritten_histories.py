"""A history that is rewritten gives the lease of the old one back; lines that live on beside each other keep theirs."""

from __future__ import annotations

import threading

import pytest

from conserve_sdk.testing import EngineReply, ScriptedEngine

pytestmark = pytest.mark.usefixtures("make_world")

SYSTEM = {"role": "system", "content": "You keep the files of an office. " * 40}
TINY = [{"role": "system", "content": "Give a title."}, {"role": "user", "content": "the files"}]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def call(number: int) -> dict:
    function = {"name": "look", "arguments": f'{{"q": {number}}}'}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": f"c{number}", "type": "function", "function": function}],
    }


def result(number: int, text: str = "") -> dict:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text or f"page {number} " * 60}


def leases(world) -> list:
    assert world.conserve.flush()
    return list(world.broker.core.leases())


def released(world) -> int:
    return sum(exchange.method == "DELETE" for exchange in world.broker.exchanges)


def requests(world) -> list[str]:
    """What the broker was asked for leases."""
    return [exchange.request.decode() for exchange in world.broker.exchanges if exchange.path == "/v1/leases"]


def edited(history: list[dict]) -> list[dict]:
    """All tool results but the last are cleared, as LangChain's `ClearToolUsesEdit(keep=1)` does."""
    last = max(place for place, message in enumerate(history) if message["role"] == "tool")
    return [
        {**message, "content": "[cleared]"} if message["role"] == "tool" and place != last else message
        for place, message in enumerate(history)
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_context_editing_leaves_one_lease(make_world, stream) -> None:
    calls = [EngineReply.chat_stream(tool="look") if stream else EngineReply.chat(tool="look") for _ in range(5)]
    world = make_world(engine=ScriptedEngine(*calls, then="answer", prefills="answer"))
    history = [SYSTEM, user("look them up")]
    world.turn(messages=history, stream=stream)
    for number in range(4):
        history += [call(number), result(number)]
        world.turn(messages=edited(history), stream=stream)
        assert len(leases(world)) == 1, "the lease that waited for the tool has nothing to wait for any more"
    lineages = {record.lineage for record in world.turns.records}
    assert (len(lineages), released(world)) == (4, 3)
    before = [record.decoder_id for record in world.turns.records][1:-1]
    for decoder, asked in zip(before, requests(world)[1:], strict=True):
        assert f'"hint_engine_id":"{decoder}"' in asked
    assert len(world.conserve._runtime.kit.registry.views("c1", now_ms=0)) == 1


@pytest.mark.parametrize("kept", [3, 5])
def test_a_compaction_leaves_one_lease_and_the_next_one_too(world, kept) -> None:
    history = [SYSTEM, user("first question")]
    for round_ in range(2):
        for turn in range(4):
            world.turn(messages=history)
            history += [assistant(f"answer {round_} {turn} " * 20), user(f"question {round_} {turn}")]
        history = [SYSTEM, user(f"Summary {round_}: much was said. " * 10), *history[-kept:]]
    world.turn(messages=history)
    (lease,) = leases(world)
    assert lease.lease_id == world.record.lease_id
    assert released(world) == 2
    ids = list(dict.fromkeys(record.lease_id for record in world.turns.records))
    assert len(ids) == world.asked() == 3
    for before, asked in zip(ids, requests(world)[1:], strict=False):
        assert f'"parent_lease_id":"{before}"' in asked


def test_a_supervisor_and_its_worker_both_live_on(world) -> None:
    boss, worker = [SYSTEM, user("delegate")], [{**SYSTEM, "content": "You work. " * 200}, user("do 0")]
    for turn in range(3):
        world.turn(messages=boss)
        world.turn(messages=worker)
        boss += [call(turn), result(turn)]
        worker += [assistant("done"), user(f"do {turn + 1}")]
    assert len(leases(world)) == 2
    assert (released(world), world.asked()) == (0, 2)


@pytest.mark.parametrize("shots", [[], [user("an example"), assistant("of an answer")]], ids=["bare", "few-shot"])
def test_the_branches_of_a_fan_out_all_live_on(world, shots) -> None:
    branches = [
        [
            SYSTEM,
            *shots,
            *[user(f"part {part} of item {number} " * 30) for part in range(number + 1)],
            user("Check it."),
        ]
        for number in range(3)
    ]
    for turn in range(3):
        for branch in branches:
            world.turn(messages=branch)
            branch += [assistant("hm"), user(f"sure? {turn}")]
    assert len(leases(world)) == 3
    assert (released(world), world.asked()) == (0, 3)


def test_agents_that_hand_over_to_each_other_both_live_on(world) -> None:
    said = [user("my bill is wrong " * 50)]
    for turn in range(4):
        system = {**SYSTEM, "content": ("You route. " if turn % 2 == 0 else "You do billing. ") * 30}
        world.turn(messages=[system, *said])
        said += [assistant(f"over to you {turn}"), user(f"and {turn}?")]
    assert len(leases(world)) == 2
    assert (released(world), world.asked()) == (0, 2)


def test_an_edited_question_leaves_the_old_line_to_its_time(world) -> None:
    """Somebody goes back and asks something else: they may return to what was said before."""
    history = [SYSTEM, user("first"), assistant("ok"), user("second")]
    world.turn(messages=history)
    world.turn(messages=[*history[:-1], user("another second")])
    world.turn(messages=[*history, assistant("ok"), user("third")])
    assert len(leases(world)) == 2
    assert (released(world), world.asked()) == (0, 2)


def test_a_line_with_a_turn_in_flight_keeps_its_lease(make_world) -> None:
    reached, goes_on = threading.Event(), threading.Event()

    def slow(_call) -> EngineReply:
        reached.set()
        assert goes_on.wait(60)
        return EngineReply.chat()

    world = make_world(engine=ScriptedEngine(then="answer", prefills="answer"))
    other = make_world(engine=world.engine, broker=world.broker)
    other.conserve._runtime.kit.registry = world.conserve._runtime.kit.registry
    other.conserve._runtime.kit.book = world.conserve._runtime.kit.book
    history = [SYSTEM, user("look them up")]
    world.turn(messages=history)
    history += [call(0), result(0)]
    world.turn(messages=history)
    world.engine.script("d0", slow)
    thread = threading.Thread(target=other.turn, kwargs={"messages": history})
    thread.start()
    assert reached.wait(60)
    world.turn(messages=[*history[:-1], result(0, "[cleared]"), call(1), result(1)])
    goes_on.set()
    thread.join()
    assert released(world) == 0
    assert len(leases(world)) == 2


def test_a_lease_that_cannot_be_given_back_ends_by_its_time(world) -> None:
    history = [SYSTEM, user("look them up")]
    world.turn(messages=history)
    world.turn(messages=[*history, call(0), result(0)])
    leases(world)
    world.broker.fail_next(20)
    history = [*history, call(0), result(0, "[cleared]"), call(1), result(1)]
    kit = world.conserve._runtime.kit
    kit.reporter.give_back(kit.registry.views("c1", now_ms=kit.now_ms())[0].grant)
    world.conserve.flush(30)
    assert world.broker.core.lease_count() == 1
    world.broker._failures.clear()
    world.clock.advance(3_600_000)
    assert world.broker.core.lease_count() == 0


# ---- tiny strangers -------------------------------------------------------------------------------------------


def test_the_same_tiny_request_again_and_again_takes_no_lease(world) -> None:
    world.turn()
    for _ in range(3):
        world.turn(messages=TINY)
    world.turn(messages=TINY[:1])
    assert world.asked() == 1
    assert {record.lease_id for record in world.turns.records[1:]} == {None}
    assert set(world.engines_called[1:]) == {"d0"}


def test_a_tiny_request_that_grows_takes_one(world) -> None:
    world.turn()
    world.turn(messages=TINY)
    world.turn(messages=[*TINY, assistant("Files"), user("shorter")])
    assert world.asked() == 2


def test_a_tiny_rewritten_history_is_no_stranger(world) -> None:
    history = [{"role": "system", "content": "Be short."}, user("hello " * 400)]
    world.turn(messages=history)
    world.turn(messages=[history[0], user("(long question)"), assistant("ok"), user("go on")])
    assert world.turns.records[-1].lease_id is None, "nothing of what was said comes again"
    history += [assistant("ok"), user("and?")]
    world.turn(messages=history)
    world.turn(messages=[history[0], user("(summary)"), history[-1], assistant("so"), user("well")])
    assert world.record.lease_id is not None
    assert len(leases(world)) == 1


# ---- parents --------------------------------------------------------------------------------------------------


def test_a_conversation_may_name_its_parent(world) -> None:
    world.turn(conversation_id="boss")
    world.turn("work " * 400, conversation_id="worker", extra_headers={"X-ConServe-Parent": "boss"})
    boss, worker = (record.lease_id for record in world.turns.records)
    request = requests(world)[-1]
    assert f'"parent_lease_id":"{boss}"' in request
    assert '"hint_engine_id":"d0"' in request
    assert worker != boss
    assert "x-conserve-parent" not in world.engine.calls[-1].headers


def test_a_parent_that_nobody_knows_is_none(world) -> None:
    world.turn(extra_headers={"X-ConServe-Parent": "nobody"})
    request = requests(world)[-1]
    assert '"parent_lease_id":null' in request

"""What the broker wants is done between two turns: another lease on its word, another lease before a giant append."""

from __future__ import annotations

import asyncio
import logging
import threading

import httpx2
import pytest

from conserve_sdk import Timeouts
from conserve_sdk._turn import TurnKit
from conserve_sdk.testing import EngineReply, ScriptedEngine, small_fleet
from tests.support.dialogue import LONG, follow_up
from tests.support.patience import be_patient

from .directed import REFUSAL, DirectedBroker, problem

QUICK = Timeouts(broker_s=0.05)


@pytest.fixture
def directed(make_world):
    def make(engines=None, **options):
        return make_world(broker=DirectedBroker(engines), **options)

    return make


def told(world, directive: str = "re_lease", reason: str = "draining") -> None:
    """The broker says it to the report of the last turn."""
    world.broker.directive, world.broker.reason = directive, reason
    world.reports()


def withdrawn(world) -> None:
    world.broker.directive, world.broker.reason = "none", ""


# ---- re-lease -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_lease_moves_once_between_two_turns_and_takes_its_kv_along(directed, stream) -> None:
    world = directed()
    world.turn(stream=stream)
    told(world)
    withdrawn(world)
    outcome = world.turn(messages=follow_up(), stream=stream)
    assert outcome.text == "ok"
    assert world.engines_called == ["p0", "d0", "d0", "d1"]
    _, _, prefill, decode = world.engine.calls
    assert prefill.body["kv_transfer_params"] == {"do_remote_decode": True, "do_remote_prefill": False}
    assert (prefill.body["max_tokens"], prefill.body["stream"]) == (1, False)
    assert decode.body["kv_transfer_params"]["do_remote_prefill"] is True
    assert decode.body["kv_transfer_params"]["prompt_token_ids"] == [1, 2, 3]
    assert prefill.body["messages"] == decode.body["messages"]
    record = world.record
    assert (record.first_turn, record.migrated, record.epoch, record.mode) == (False, True, 2, "migrate")
    assert (record.prefill_engine_id, record.decoder_id) == ("d0", "d1")
    assert (record.failovers, record.loss, record.error, record.hops) == (0, "", "", 2)
    assert outcome.headers["x-conserve-prefiller"] == "d0"
    world.turn(messages=follow_up(2), stream=stream)
    assert world.engines_called[4:] == ["d1"]
    world.reports()
    (lease,) = world.broker.core.leases()
    assert (lease.epoch, lease.migrations, lease.turns) == (2, 1, 2)


def test_what_the_broker_is_asked(directed) -> None:
    world = directed()
    world.turn()
    told(world, reason="load")
    world.turn(messages=follow_up())
    (body,) = world.broker.asked
    assert (body["cause"], body["reason"], body["failed_engine_id"]) == ("re_lease", "load", None)
    assert (body["cached_tokens"], body["epoch"]) == (105, 1)  # 100 of the prompt, 5 of the answer
    assert (body["first_turn_input_tokens"], body["wait_ms"]) == (0, 0)
    assert body["first_turn_input_bytes"] > len(LONG)
    assert world.broker.timeouts[0]["read"] <= 1.0  # a turn with a live lease does not wait long for a better one


def test_a_directive_that_is_withdrawn_is_not_followed(directed) -> None:
    world = directed()
    world.turn()
    told(world)
    assert standing(world) == "draining"
    assert world.run(lambda: world.conserve.park("c1"), lambda: world.conserve.apark("c1")) == 1
    assert standing(world) == ""  # the answer to the park says nothing of it
    world.turn(messages=follow_up())
    assert world.broker.asked == []
    assert world.engines_called == ["p0", "d0", "d0"]


def standing(world) -> str:
    (view,) = world.conserve._runtime.kit.registry.views("c1", now_ms=world.clock.now_ms())
    return view.directive


def test_the_broker_may_say_stay_and_is_not_asked_again_until_it_says_so_again(directed) -> None:
    world = directed()
    world.broker.answer = "stay"
    world.turn()
    told(world)
    withdrawn(world)
    for turn in (1, 2, 3):
        assert world.turn(messages=follow_up(turn)).text == "ok"
    assert len(world.broker.asked) == 1
    assert world.engines_called == ["p0", "d0", "d0", "d0", "d0"]
    assert (world.record.epoch, world.record.first_turn, world.record.migrated) == (1, False, False)
    told(world)
    world.turn(messages=follow_up(4))
    assert len(world.broker.asked) == 2


def test_another_decoder_without_a_transfer(directed) -> None:
    world = directed()
    world.broker.answer = "local"
    world.turn()
    told(world)
    world.turn(messages=follow_up())
    assert world.engines_called == ["p0", "d0", "d1"]
    assert (world.record.mode, world.record.migrated, world.record.loss) == ("local", False, "")


@pytest.mark.parametrize(
    "answer",
    [
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        REFUSAL,
        problem(422, "bad_request"),
        problem(404, "lease_unknown"),
        problem(409, "lease_superseded"),
        problem(409, "engine_lost"),
        problem(500, ""),
        b"<html>it works</html>",
        b"[]",
        b"",
    ],
    ids=repr,
)
def test_a_move_that_fails_leaves_everything_as_it_was(directed, answer, caplog) -> None:
    world = directed(timeouts=QUICK)
    world.broker.answer = answer
    world.turn()
    told(world)
    withdrawn(world)
    with caplog.at_level(logging.INFO):
        outcome = world.turn(messages=follow_up())
    assert (outcome.error, outcome.text) == (None, "ok")
    assert world.engines_called == ["p0", "d0", "d0"]
    assert (world.record.loss, world.record.epoch, world.record.lease_id) == ("", 1, world.turns.records[0].lease_id)
    assert "lease_kept" in caplog.text
    asked = len(world.broker.asked)
    world.turn(messages=follow_up(2))
    assert len(world.broker.asked) == asked  # not before the broker says it again
    world.broker.answer = "move"
    be_patient(world.conserve)
    told(world)
    world.turn(messages=follow_up(3))
    assert world.engines_called[-2:] == ["d0", "d1"]


@pytest.mark.parametrize("reply", [EngineReply.unreachable(), EngineReply.failure(500), EngineReply.silent()])
def test_an_old_decoder_that_is_gone_costs_a_prefill_and_no_answer(directed, reply) -> None:
    world = directed()
    world.turn()
    told(world)
    withdrawn(world)
    world.engine.script("d0", reply)
    assert world.turn(messages=follow_up()).text == "ok"
    assert world.engines_called == ["p0", "d0", "d0", "d1"]
    assert (world.record.loss, world.record.migrated, world.record.failovers) == ("prefill_failed", False, 0)
    assert (world.record.decoder_id, world.record.epoch) == ("d1", 2)
    assert world.turn(messages=follow_up(2)).text == "ok"
    assert world.engines_called[4:] == ["d1"]


def test_a_new_decoder_that_fails_is_replaced_like_any_other(directed) -> None:
    world = directed(small_fleet(decoders=3))
    world.turn()
    told(world)
    withdrawn(world)
    world.engine.script("d1", EngineReply.unreachable()).script("d2", EngineReply.unreachable())
    outcome = world.turn(messages=follow_up())
    assert outcome.text == "ok"
    assert len(world.broker.asked) == 1  # inside a turn only a failure asks for another lease
    assert (world.record.failovers, world.record.loss, world.record.epoch) == (1, "decoder_failed", 3)


def test_no_more_than_its_share_of_the_budget_goes_to_the_old_decoder(directed) -> None:
    world = directed()
    world.turn()
    told(world)
    world.turn(messages=follow_up(), timeout=httpx2.Timeout(10.0))
    prefill, decode = world.engine.calls[2:]
    assert prefill.timeout["read"] == 5.0
    assert decode.timeout["read"] == 10.0


def test_a_turn_whose_kv_must_not_travel_leaves_the_move_to_the_next(directed) -> None:
    world = appending(directed)
    world.turn()
    told(world)
    withdrawn(world)
    world.turn(messages=follow_up(more="x" * 10_000), n=2)
    assert world.broker.asked == []
    assert world.engines_called == ["p0", "d0", "d0"]
    world.turn(messages=[*follow_up(more="x" * 10_000), *follow_up()[1:]])
    assert [body["cause"] for body in world.broker.asked] == ["re_lease"]


def test_a_running_turn_of_the_lineage_is_not_moved_under(directed) -> None:
    world = directed()
    world.turn()
    told(world)

    def blocking() -> None:
        body = {"model": "test-model", "messages": follow_up(), "stream": True}
        with world.conserve.http_client().stream(
            "POST", "/chat/completions", json=body, headers={"X-ConServe-Conversation": "c1"}
        ):
            assert len(world.broker.asked) == 1
            told(world)  # again, while this turn is being answered
            assert standing(world) == "draining"
            assert world._turn("c1", False, 0, {"model": "test-model", "messages": follow_up(2)}).text == "ok"
            assert len(world.broker.asked) == 1
            withdrawn(world)
        assert world._turn("c1", False, 0, {"model": "test-model", "messages": follow_up(3)}).text == "ok"

    async def looped() -> None:
        await asyncio.to_thread(blocking)

    world.run(blocking, looped)
    assert len(world.broker.asked) == 2
    assert world.record.epoch == 3


def test_a_turn_that_gets_in_just_before_is_not_moved_under_either(directed, monkeypatch) -> None:
    world = directed()
    world.turn()
    told(world)
    withdrawn(world)
    looks = iter([False, True])  # nobody is being answered; then, as this turn is about to ask, somebody is
    monkeypatch.setattr(TurnKit, "is_answering", lambda kit, ref: next(looks))
    world.turn(messages=follow_up())
    assert (world.broker.asked, world.record.decoder_id, world.record.first_turn) == ([], "d0", False)
    assert standing(world) == "draining"


def test_of_two_turns_at_once_one_asks_and_both_go_to_the_new_decoder(directed) -> None:
    class Held(ScriptedEngine):
        """The prefill leg on the old decoder ends when the other turn waits for it."""

        def _next(self, call):
            if call.engine == "d0" and call.body.get("max_tokens") == 1:
                registry, waiting = world.conserve._runtime.kit.registry, None
                for _ in range(6_000):
                    waiting = [flight for flight in registry._flights.values() if flight.followers]
                    if waiting:
                        break
                    released.wait(0.01)
                assert waiting, "the other turn waits"
            return super()._next(call)

    released = threading.Event()
    world = directed(engine=Held(then="answer"))
    world.turn()
    told(world)
    withdrawn(world)
    bodies = [{"model": "test-model", "messages": follow_up(more=text)} for text in ("left", "right")]
    results = []

    def one(body) -> None:
        results.append(world._turn("c1", False, 0, body).text)

    threads = [threading.Thread(target=one, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == ["ok", "ok"]
    assert len(world.broker.asked) == 1
    assert world.engines_called == ["p0", "d0", "d0", "d1", "d1"]
    assert [record.migrated for record in world.turns.records].count(True) == 2


def test_a_lease_that_another_process_moved_is_found_between_turns(make_world) -> None:
    broker = DirectedBroker()
    one, two = make_world(broker=broker), make_world(broker=broker)
    one.turn()
    two.turn(messages=follow_up())
    told(two)
    withdrawn(two)
    two.turn(messages=follow_up(2))
    assert two.record.decoder_id == "d1"
    one.turn(messages=follow_up(3))  # its lease is superseded, which it does not know yet: the answer is right
    assert (one.record.decoder_id, one.record.error) == ("d0", "")
    one.reports()
    (view,) = one.conserve._runtime.kit.registry.views("c1", now_ms=one.clock.now_ms())
    assert view.lost == "superseded"
    one.turn(messages=follow_up(4))
    assert (one.record.decoder_id, one.record.lease_id) == ("d1", two.record.lease_id)
    assert one.engines_called == ["p0", "d0", "d0", "d1"]  # and its KV is not moved a second time


# ---- giant appends --------------------------------------------------------------------------------------------


def appending(directed, **options):
    world = directed(**options)
    world.broker.append_threshold_tokens = 50  # a turn of 100 tokens for some 2,400 bytes: 1,200 bytes
    return world


def test_a_giant_append_is_asked_about_first(directed) -> None:
    world = appending(directed)
    world.turn()
    assert world.turn(messages=follow_up(more="x" * 10_000)).text == "ok"
    (body,) = world.broker.asked
    assert (body["cause"], body["cached_tokens"], body["failed_engine_id"]) == ("append", 105, None)
    assert body["first_turn_input_bytes"] > 12_000
    assert body["reason"].startswith("about ")
    assert world.engines_called == ["p0", "d0", "d0", "d1"]
    assert (world.record.migrated, world.record.first_turn, world.record.epoch) == (True, False, 2)


def test_a_prefiller_may_compute_it_for_the_same_decoder(directed) -> None:
    world = appending(directed)
    world.broker.answer = "append"
    world.turn()
    assert world.turn(messages=follow_up(more="x" * 10_000)).text == "ok"
    assert world.engines_called == ["p0", "d0", "p0", "d0"]
    assert world.engine.calls[-1].body["kv_transfer_params"]["do_remote_prefill"] is True
    assert (world.record.migrated, world.record.first_turn, world.record.epoch) == (True, False, 2)
    assert (world.record.prefill_engine_id, world.record.loss) == ("p0", "")
    small = [*follow_up(more="x" * 10_000), *follow_up()[1:]]
    world.turn(messages=small)
    assert world.engines_called[4:] == ["d0"]
    assert len(world.broker.asked) == 1


def test_a_transfer_is_counted_though_its_lease_was_replaced_before_the_report(directed) -> None:
    world = appending(directed)
    world.broker.answer = "append"
    world.turn()
    world.turn(messages=follow_up(more="x" * 10_000))
    assert world.broker.core.counters.migrations == 0
    world.reports()
    assert world.broker.core.counters.migrations == 2


def test_the_live_lease_may_be_the_answer(directed) -> None:
    world = appending(directed)
    world.broker.answer = "stay"
    world.turn()
    world.turn(messages=follow_up(more="x" * 10_000))
    assert len(world.broker.asked) == 1
    assert world.engines_called == ["p0", "d0", "d0"]


def test_a_broker_that_does_not_answer_costs_a_giant_append_little(directed) -> None:
    world = appending(directed, timeouts=QUICK)
    world.broker.answer = httpx2.ConnectError("refused")
    world.turn()
    assert world.turn(messages=follow_up(more="x" * 10_000)).text == "ok"
    assert world.engines_called == ["p0", "d0", "d0"]


@pytest.mark.parametrize(
    ("messages", "asked"),
    [
        (follow_up(more="x" * 900), False),
        (follow_up(more="x" * 1_500), True),
        (follow_up(answer="x" * 10_000), False),  # the model's own words are in its decoder's cache
        (follow_up(answer="x" * 10_000, more="x" * 1_500), True),
    ],
)
def test_only_what_is_new_counts(directed, messages, asked) -> None:
    world = appending(directed)
    world.broker.answer = "stay"
    world.turn()
    world.turn(messages=messages)
    assert bool(world.broker.asked) is asked


def test_without_usage_there_is_no_ratio_and_no_question(directed) -> None:
    engine = ScriptedEngine(then="answer").script("d0", EngineReply.chat_stream("ok", usage=False))
    world = appending(directed, engine=engine)
    world.turn(stream=True)
    world.turn(messages=follow_up(more="x" * 10_000))
    assert world.broker.asked == []


def test_neither_first_turns_nor_leases_without_a_threshold_ask(directed) -> None:
    world = appending(directed)
    world.turn("x" * 20_000)
    world.broker.append_threshold_tokens = 0
    world.turn(conversation_id="c2")
    world.turn(messages=follow_up(more="x" * 10_000), conversation_id="c2")
    assert world.broker.asked == []

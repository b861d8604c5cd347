"""Leases end, and brokers fail or refuse: each scenario in both colours."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future

import openai
import pytest

from conserve_sdk import BrokerUnavailable, LeaseRefused, Timeouts
from conserve_sdk._turn import Wait, placing
from conserve_sdk._turn.effects import acquire
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine, small_fleet
from tests.support.dialogue import follow_up
from tests.support.patience import be_patient, hurry

pytestmark = pytest.mark.usefixtures("make_world")

# ---- leases end -----------------------------------------------------------------------------------------------


def test_an_expired_lease_is_a_normal_path(world) -> None:
    world.turn()
    world.clock.advance(61_000)
    outcome = world.turn(messages=follow_up())
    assert outcome.text == "ok"
    assert world.engines_called == ["p0", "d0", "p0", "d0"]
    assert (world.record.first_turn, world.record.turn, world.record.loss) == (True, 2, "")
    request = json.loads([e for e in world.broker.exchanges if e.path == "/v1/leases"][-1].request)
    assert request["hint_engine_id"] == "d0"


def test_a_restarted_decoder_loses_its_leases(world) -> None:
    world.turn()
    world.broker.restart_engine("d0")
    world.turn(messages=follow_up())  # nobody knows yet
    world.conserve.flush()
    world.turn(messages=follow_up(2))
    assert world.engines_called[:3] == ["p0", "d0", "d0"]
    assert world.engines_called[3] == "p0"
    assert world.record.first_turn
    request = json.loads([e for e in world.broker.exchanges if e.path == "/v1/leases"][-1].request)
    assert request["hint_engine_id"] is None


@pytest.mark.parametrize("amnesia", [True, False])
def test_a_lease_the_broker_forgot_is_replaced_when_its_decoder_fails(make_world, amnesia) -> None:
    engine = ScriptedEngine(then="answer")
    world = make_world(engine=engine)
    world.turn()
    world.conserve.flush()
    if amnesia:
        world.broker.restart(lose_state=True)
    else:
        other = make_world(broker=world.broker)
        other.turn(messages=follow_up())
        other.run(lambda: other.conserve.release("c1"), lambda: other.conserve.arelease("c1"))
    engine.script("d0", EngineReply.unreachable())
    assert world.turn(messages=follow_up()).headers["x-conserve-decoder"] == "d1"
    assert world.record.epoch == 2


def test_a_second_process_goes_on_without_another_transfer(make_world) -> None:
    one = make_world()
    two = make_world(broker=one.broker)
    one.turn()
    one.conserve.flush()
    assert two.turn(messages=follow_up()).headers["x-conserve-decoder"] == "d0"
    assert two.engines_called == ["d0"]
    assert not two.record.first_turn
    assert one.broker.core.lease_count() == 1


def test_release_and_park(world) -> None:
    world.turn()
    world.conserve.flush()
    assert world.run(lambda: world.conserve.park("c1"), lambda: world.conserve.apark("c1")) == 1
    (lease,) = world.broker.core.leases()
    assert lease.activity == "parked"
    assert world.run(lambda: world.conserve.release("c1"), lambda: world.conserve.arelease("c1")) == 1
    assert world.broker.core.lease_count() == 0
    assert world.run(lambda: world.conserve.release("c1"), lambda: world.conserve.arelease("c1")) == 0
    assert world.run(lambda: world.conserve.park("c1"), lambda: world.conserve.apark("c1")) == 0


# ---- the broker fails or refuses ------------------------------------------------------------------------------


def test_live_leases_go_on_without_a_broker(world) -> None:
    world.turn()
    world.conserve.flush()
    world.broker.stop()
    assert world.turn(messages=follow_up()).text == "ok"
    world.broker.start()
    assert world.turn(messages=follow_up(2)).text == "ok"
    assert world.engines_called == ["p0", "d0", "d0", "d0"]


def test_new_conversations_fall_back(make_world) -> None:
    engines = ["http://f0.invalid/v1", "http://f1.invalid"]
    world = make_world(fallback_engines=engines, wait_s=0)
    world.broker.stop()
    hurry(world.conserve)
    for name in ("a", "b", "c", "d", "e", "f"):
        for turn in range(2):
            outcome = world.turn(messages=follow_up(turn), conversation_id=name)
            assert outcome.headers["x-conserve-loss"] == "broker_unavailable"
    called = world.engines_called
    assert called[0::2] == called[1::2]  # each conversation stays where it is
    assert set(called) == {"f0", "f1"}
    assert {call.path for call in world.engine.calls} == {"/v1/chat/completions"}
    assert all("kv_transfer_params" not in call.body for call in world.engine.calls)
    assert (world.record.lease_id, world.record.mode, world.record.loss) == (None, None, "broker_unavailable")
    world.broker.start()
    be_patient(world.conserve)
    world.clock.advance(5_000)
    world.turn(messages=follow_up(2), conversation_id="a")
    assert world.engines_called[-2:] == ["p0", "d0"]


@pytest.mark.parametrize(("engines", "gone_ms"), [([], None), (["http://f0.invalid"], 700)], ids=["none", "one"])
def test_a_broker_that_is_gone_is_given_up_sooner_where_there_is_another_way(
    make_world, monkeypatch, engines, gone_ms
) -> None:
    asked_for = []

    def spied(request, **more):
        asked_for.append(more["gone_ms"])
        return acquire(request, **more)

    monkeypatch.setattr(placing, "acquire", spied)
    world = make_world(fallback_engines=engines, timeouts=Timeouts(broker_gone_s=0.7))
    world.turn()
    assert asked_for == [gone_ms]


def test_a_broker_that_did_not_answer_is_left_alone_for_a_while(make_world) -> None:
    world = make_world(fallback_engines=["http://f0.invalid"], wait_s=0)
    world.broker.stop()
    hurry(world.conserve)
    world.turn()
    world.broker.start()
    be_patient(world.conserve)
    world.turn(messages=follow_up())
    assert (world.asked(), world.engines_called) == (0, ["f0", "f0"])
    world.clock.advance(4_999)
    world.turn(messages=follow_up(2))
    assert world.asked() == 0
    world.clock.advance(1)
    world.turn(messages=follow_up(3))
    assert (world.asked(), world.engines_called[-1]) == (1, "d0")


def test_a_fallback_engine_fails_over_too(make_world) -> None:
    engine = ScriptedEngine(EngineReply.unreachable(), then="answer")
    world = make_world(engine=engine, fallback_engines=["http://f0.invalid", "http://f1.invalid"], wait_s=0)
    world.broker.stop()
    hurry(world.conserve)
    assert world.turn().text == "ok"
    assert sorted(world.engines_called) == ["f0", "f1"]
    assert world.record.failovers == 1


def test_a_dead_decoder_and_a_dead_broker_fall_back(make_world) -> None:
    engine = ScriptedEngine(then="answer")
    world = make_world(engine=engine, fallback_engines=["http://f0.invalid"], wait_s=0)
    world.turn()
    world.conserve.flush()
    world.broker.stop()
    hurry(world.conserve)
    engine.script("d0", EngineReply.unreachable())
    assert world.turn(messages=follow_up()).text == "ok"
    assert world.engines_called[-2:] == ["d0", "f0"]


def test_a_dead_decoder_and_a_dead_broker_without_fallback(make_world) -> None:
    engine = ScriptedEngine(then="answer")
    world = make_world(engine=engine, wait_s=0)
    world.turn()
    world.conserve.flush()
    world.broker.stop()
    hurry(world.conserve)
    engine.script("d0", EngineReply.unreachable())
    assert isinstance(world.turn(messages=follow_up()).error, openai.APIConnectionError)


@pytest.mark.parametrize("options", [{}, {"on_broker_unavailable": "raise", "fallback_engines": ["http://f0.invalid"]}])
def test_no_broker_and_no_fallback_is_a_clear_error(make_world, options) -> None:
    world = make_world(wait_s=0, **options)
    world.broker.stop()
    hurry(world.conserve)
    outcome = world.turn(max_retries=2)
    assert isinstance(outcome.error, BrokerUnavailable)
    assert world.engines_called == []
    assert (world.record.error, world.record.lease_id) == ("BrokerUnavailable", None)


def test_a_refusal_is_not_retried(make_world) -> None:
    world = make_world(wait_s=0)
    outcome = world.turn(model="unheard-of", max_retries=2)
    assert isinstance(outcome.error, LeaseRefused)
    assert outcome.error.reason == "unknown_model"
    assert world.asked() == 1


def test_admission_is_waited_for_and_counted(make_world) -> None:
    fleet = small_fleet(decoders=1)
    broker = InMemoryBroker(fleet, settings=BrokerSettings(placement=PAPER, ttl_ms=10_000))
    big = EngineReply.chat(prompt_tokens=99_000)
    world = make_world(broker=broker, engine=ScriptedEngine(then="answer").script("d0", big))
    world.turn(conversation_id="a")
    world.conserve.flush()
    outcome = world.turn("other " * 2_000, conversation_id="b")  # waits until the first lease expires
    assert outcome.text == "ok"
    assert world.record.lease_wait_ms >= 9_000
    assert world.record.ttft_ms >= 9_000


# ---- another turn's lease is waited for -----------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(6))
def test_a_cancellation_that_meets_the_lease_it_waits_for_is_not_lost(make_async_world, steps) -> None:
    world = make_async_world()

    async def go() -> None:
        awaited: Future[None] = Future()
        wait = world.conserve._runtime.async_performer.perform(Wait(future=awaited, timeout_s=60.0))
        task = asyncio.create_task(wait)
        await asyncio.sleep(0)
        awaited.set_result(None)
        for _ in range(steps):  # the event loop hands the result on in several steps: between any two of them
            await asyncio.sleep(0)
        if task.cancel():
            await asyncio.wait([task])
            assert task.cancelled()

    world.runner.run(go())

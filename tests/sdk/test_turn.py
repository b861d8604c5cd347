"""Every rule of a turn, each scenario in both colours, on a scripted engine and the real broker core."""

from __future__ import annotations

import json
import logging

import httpx2
import openai
import pytest

from conserve_sdk import BrokerUnavailable, EngineUnavailable, LeaseClosed, LeaseRefused, Timeouts
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine, small_fleet

pytestmark = pytest.mark.usefixtures("make_world")

LONG = "hello " * 400


def follow_up(turns: int = 1) -> list[dict]:
    messages = [{"role": "user", "content": LONG}]
    for _ in range(turns):
        messages += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "more"}]
    return messages


# ---- the good path --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_one_prefill_one_transfer_one_decoder(world, stream) -> None:
    outcomes = [world.turn(messages=follow_up(turn), stream=stream) for turn in range(4)]
    assert [outcome.text for outcome in outcomes] == ["ok"] * 4
    assert world.engines_called == ["p0", "d0", "d0", "d0", "d0"]
    assert world.asked() == 1
    prefill, decode, *tail = world.engine.calls
    assert prefill.body["kv_transfer_params"] == {"do_remote_decode": True, "do_remote_prefill": False}
    assert decode.body["kv_transfer_params"]["do_remote_prefill"] is True
    assert decode.body["kv_transfer_params"]["prompt_token_ids"] == [1, 2, 3]
    assert [call.body["kv_transfer_params"] for call in tail] == [{"do_remote_decode": True}] * 3
    records = world.turns.records
    assert [record.first_turn for record in records] == [True, False, False, False]
    assert [record.turn for record in records] == [1, 2, 3, 4]
    assert [record.migrated for record in records] == [True, False, False, False]
    assert {record.loss for record in records} | {record.error for record in records} == {""}
    world.conserve.flush()
    (lease,) = world.broker.core.leases()
    assert (lease.migrations, lease.turns) == (1, 4)
    assert world.broker.core.counters.migrations == 1


def test_the_application_sees_where_it_was_served(world) -> None:
    first, second = world.turn(), world.turn(messages=follow_up())
    (lease,) = world.broker.core.leases()
    assert {k: v for k, v in first.headers.items() if k.startswith("x-conserve-")} == {
        "x-conserve-lease": lease.lease_id,
        "x-conserve-decoder": "d0",
        "x-conserve-prefiller": "p0",
        "x-conserve-mode": "migrate",
        "x-conserve-turn": "1",
    }
    assert "x-conserve-prefiller" not in second.headers
    assert second.headers["x-conserve-turn"] == "2"


def test_what_goes_over_the_wire(world) -> None:
    secret = {"X-ConServe-Secret": "1", "x-conserve-lease": "forged", "X-Session-ID": "mine"}
    world.turn(extra_headers=secret)
    prefill, decode = world.engine.calls
    (lease,) = world.broker.core.leases()
    for call in (prefill, decode):
        assert "x-conserve-secret" not in call.headers
        assert call.headers["x-session-id"] == f"c1/{lease.key.lineage}"
        assert call.headers["x-conserve-lease"].count(".") == 2
        assert call.headers["authorization"] == "Bearer EMPTY"
        assert call.headers["accept-encoding"] == "identity"
        assert call.headers["host"] == f"{call.engine}.invalid"
        assert int(call.headers["content-length"]) == len(call.content)
    assert prefill.headers["x-request-id"] != decode.headers["x-request-id"]


def test_follow_ups_go_untouched_where_the_decoder_holds_nothing(make_world) -> None:
    world = make_world(settings=BrokerSettings(placement=PAPER, hold_ms=0))
    world.turn()
    world.turn(messages=follow_up(), temperature=0.5)
    body = world.engine.calls[-1].content
    assert b"kv_transfer_params" not in body
    assert json.loads(body)["temperature"] == 0.5
    assert not world.record.held


def test_mode_local_never_meets_a_prefiller(make_world) -> None:
    world = make_world(broker=InMemoryBroker(small_fleet(prefillers=0), settings=BrokerSettings(placement=PAPER)))
    world.turn()
    assert world.engines_called == ["d0"]
    assert (world.record.mode, world.record.prefill_engine_id, world.record.loss) == ("local", None, "")


def test_transfer_params_of_the_application_never_leave(world, caplog) -> None:
    bad = {"extra_body": {"kv_transfer_params": {"do_remote_prefill": True}}}
    world.turn(messages=follow_up(0), **bad)
    world.turn(messages=follow_up(1), **bad)
    world.turn(messages=follow_up(2), **bad)
    sent = [call.body["kv_transfer_params"] for call in world.engine.calls]
    assert sent[2:] == [{"do_remote_decode": True}] * 2
    assert sum("kv_transfer_params" in record.message for record in caplog.records) == 1


def test_several_choices_are_computed_on_the_decoder(world) -> None:
    world.turn(n=2)
    assert world.engines_called == ["d0"]
    assert "kv_transfer_params" not in world.engine.calls[0].body
    assert world.record.loss == "several_choices"
    world.turn(messages=follow_up())
    assert world.engines_called == ["d0", "d0"]


def test_other_routes_travel_the_same_way(world) -> None:
    def call(client, path, body):
        return client.post(path, json=body)

    def go(path, body) -> int:
        async def ago():
            return await call(world.conserve.async_http_client(), path, body)

        return world.run(lambda: call(world.conserve.http_client(), path, body), ago).status_code

    assert go("/completions", {"model": "test-model", "prompt": LONG}) == 200
    assert go("/responses", {"model": "test-model", "input": LONG}) == 200
    prefills = world.engine.calls_to("p0")
    assert [(c.path, c.body.get("max_tokens"), c.body.get("max_output_tokens")) for c in prefills] == [
        ("/v1/completions", 1, None),
        ("/v1/responses", None, 1),
    ]
    assert "prompt_token_ids" not in world.engine.calls[1].body["kv_transfer_params"]


def test_time_to_the_first_effective_token_counts_the_whole_tool_loop(make_world) -> None:
    engine = ScriptedEngine(then="answer").script("d0", EngineReply.chat_stream(tool="look"))
    world = make_world(engine=engine)
    world.turn(stream=True)
    assert (world.record.ttfet_ms, world.record.finish_reason) == (None, "tool_calls")
    world.clock.advance(7_000)
    world.turn(messages=follow_up(), stream=True)
    assert world.record.ttfet_ms == 7_000
    assert world.record.ttft_ms == 0
    world.clock.advance(1_000)
    world.turn(messages=follow_up(2), stream=True)
    assert world.record.ttfet_ms == 0


def test_reports_tell_the_ledger_what_the_engine_said(make_world) -> None:
    engine = ScriptedEngine(then="answer").script(
        "d0", EngineReply.chat(tool="look", prompt_tokens=500, completion_tokens=20, cached_tokens=480)
    )
    world = make_world(engine=engine)
    world.turn()
    (report,) = world.reports("turn_finished")
    assert (report["prompt_tokens"], report["completion_tokens"], report["cached_tokens"]) == (500, 20, 480)
    assert report["prompt_bytes"] >= len(LONG)
    assert (report["migrated"], report["prefill_engine_id"]) == (True, "p0")
    assert (report["finish_reason"], report["tool_names"], report["idle"]) == ("tool_calls", ["look"], True)
    assert len(world.reports("turn_started")) == 1
    (lease,) = world.broker.core.leases()
    assert lease.ledger_tokens == 520


def test_without_usage_the_broker_is_told_the_bytes(make_world) -> None:
    world = make_world(engine=ScriptedEngine(then="answer").script("d0", EngineReply.chat_stream("a", usage=False)))
    world.turn(stream=True)
    (report,) = world.reports("turn_finished")
    assert report["prompt_tokens"] == 0
    assert report["prompt_bytes"] > 2_400
    (lease,) = world.broker.core.leases()
    assert lease.ledger_tokens > 0


# ---- the prefill fails ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "loss", "told"),
    [
        (EngineReply.unreachable(), "prefill_failed", True),
        (EngineReply.broken(), "prefill_failed", True),
        (EngineReply.silent(), "prefill_failed", True),
        (EngineReply.failure(500), "prefill_failed", True),
        (EngineReply.failure(503), "prefill_failed", True),
        (EngineReply.failure(400), "prefill_failed", False),
        (EngineReply.prefill(params=None), "no_transfer_params", False),
        (EngineReply.prefill(params={"do_remote_prefill": True}), "bad_transfer_params", False),
        (EngineReply.prefill(token_ids=[]), "bad_transfer_params", False),
        (EngineReply(chunks=(b"<html>",)), "no_transfer_params", False),
    ],
)
def test_a_lost_prefill_costs_time_and_no_answer(make_world, reply, loss, told) -> None:
    world = make_world(engine=ScriptedEngine(then="answer").script("p0", reply))
    outcome = world.turn()
    assert outcome.text == "ok"
    assert outcome.headers["x-conserve-loss"] == loss
    assert "x-conserve-prefiller" not in outcome.headers
    assert world.engines_called == ["p0", "d0"]
    assert world.engine.calls[1].body["kv_transfer_params"] == {"do_remote_decode": True}
    assert (world.record.loss, world.record.migrated, world.record.hops) == (loss, False, 2)
    failures = world.reports("engine_failure")
    assert [(f["engine_id"], f["phase"]) for f in failures] == ([("p0", "prefill")] if told else [])
    world.turn(messages=follow_up())
    assert world.engines_called == ["p0", "d0", "d0"]


# ---- the transfer fails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reply", [EngineReply.failure(500), EngineReply.stream_error(), EngineReply.broken()])
def test_a_failed_transfer_is_computed_where_it_is(make_world, reply, stream) -> None:
    world = make_world(engine=ScriptedEngine(then="answer").script("d0", reply))
    outcome = world.turn(stream=stream)
    assert outcome.text == "ok"
    assert world.engines_called == ["p0", "d0", "d0"]
    assert world.engine.calls[2].body["kv_transfer_params"] == {"do_remote_decode": True}
    assert (world.record.loss, world.record.migrated, world.record.failovers) == ("transfer_failed", False, 0)
    assert [(f["engine_id"], f["phase"]) for f in world.reports("engine_failure")] == [("p0", "transfer")]


@pytest.mark.parametrize(("computed", "moved"), [(96, False), (1, True), (0, True), (None, True)])
def test_a_transfer_that_failed_under_the_decoder_is_counted_by_its_usage(make_world, computed, moved) -> None:
    """`kv_load_failure_policy=recompute` answers 200: only vLLM's account of the prompt tells."""
    details = {"cached_tokens": 0, "created_cache_tokens": computed}
    usage = {"prompt_tokens": 100, "completion_tokens": 2, "prompt_tokens_details": details}
    choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
    head = {"id": "1", "object": "chat.completion", "created": 0, "model": "test-model"}
    reply = EngineReply.json(head | {"choices": [choice], "usage": usage})
    world = make_world(engine=ScriptedEngine(then="answer").script("d0", reply))
    assert world.turn().text == "ok"
    assert (world.record.migrated, world.record.loss) == (moved, "" if moved else "transfer_failed")
    (report,) = world.reports("turn_finished")
    assert (report["migrated"], report["prefill_engine_id"]) == (moved, "p0" if moved else "d0")
    world.turn(messages=follow_up())
    assert world.engines_called == ["p0", "d0", "d0"]


def test_an_error_of_the_application_comes_back_word_for_word(make_world) -> None:
    refusal = EngineReply.failure(400, "This model's maximum context length is 4096 tokens.")
    world = make_world(engine=ScriptedEngine(then="answer").script("p0", refusal).script("d0", refusal, refusal))
    outcome = world.turn()
    assert isinstance(outcome.error, openai.BadRequestError)
    assert "4096" in str(outcome.error)
    assert world.engines_called == ["p0", "d0"]
    assert world.record.error == "http_400"
    assert world.reports("engine_failure") == []
    world.turn(messages=follow_up())
    assert world.asked() == 1


def test_a_refusal_of_a_pulled_prompt_is_asked_again_without_it(make_world) -> None:
    refusal = EngineReply.failure(400, "expired 31 s ago")
    world = make_world(engine=ScriptedEngine(then="answer").script("d0", refusal))
    assert world.turn().text == "ok"
    assert world.engines_called == ["p0", "d0", "d0"]
    assert world.record.loss == "transfer_failed"


@pytest.mark.parametrize("status", [401, 403, 429])
def test_refusals_that_another_body_would_not_change_are_passed_on(make_world, status) -> None:
    world = make_world(engine=ScriptedEngine(then="answer").script("d0", EngineReply.failure(status)))
    assert world.turn().error.status_code == status
    assert world.engines_called == ["p0", "d0"]


# ---- the decoder fails ----------------------------------------------------------------------------------------

DOWN = [EngineReply.unreachable(), EngineReply.failure(503), EngineReply.failure(502), EngineReply.failure(504)]


@pytest.mark.parametrize("reply", DOWN)
def test_a_first_turn_fails_over_once(make_world, reply) -> None:
    world = make_world(engine=ScriptedEngine(then="answer").script("d0", reply))
    outcome = world.turn()
    assert outcome.text == "ok"
    assert outcome.headers["x-conserve-decoder"] == "d1"
    assert world.engines_called == ["p0", "d0", "p0", "d1"]
    assert (world.record.failovers, world.record.loss, world.record.epoch) == (1, "decoder_failed", 2)
    assert [(f["engine_id"], f["phase"]) for f in world.reports("engine_failure")] == [("d0", "decode")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reply", [*DOWN, EngineReply.failure(500), EngineReply.stream_error()])
def test_a_follow_up_fails_over_and_migrates_anew(make_world, reply, stream) -> None:
    engine = ScriptedEngine(then="answer")
    world = make_world(engine=engine)
    world.turn()
    engine.script("d0", reply)
    outcome = world.turn(messages=follow_up(), stream=stream)
    assert outcome.text == "ok"
    assert world.engines_called == ["p0", "d0", "d0", "p0", "d1"]
    world.turn(messages=follow_up(2))
    assert world.engines_called[-1] == "d1"
    assert (world.record.epoch, world.record.failovers) == (2, 0)


def test_after_the_second_decoder_openai_gets_its_turn(make_world) -> None:
    engine = ScriptedEngine(then="answer")
    engine.script("d0", EngineReply.unreachable()).script("d1", EngineReply.unreachable())
    world = make_world(engine=engine)
    outcome = world.turn()
    assert isinstance(outcome.error, openai.APIConnectionError)
    assert world.engines_called == ["p0", "d0", "p0", "d1"]
    assert world.record.error == "unreachable"


def test_the_second_503_is_passed_on(make_world) -> None:
    engine = ScriptedEngine(then="answer")
    engine.script("d0", EngineReply.failure(503)).script("d1", EngineReply.failure(503, "queue is full"))
    world = make_world(engine=engine)
    outcome = world.turn()
    assert isinstance(outcome.error, openai.InternalServerError)
    assert "queue is full" in str(outcome.error)


def test_without_another_decoder_the_engines_own_error_is_seen(make_world) -> None:
    engine = ScriptedEngine(then="answer").script("d0", EngineReply.unreachable())
    broker = InMemoryBroker(small_fleet(decoders=1), settings=BrokerSettings(placement=PAPER))
    world = make_world(engine=engine, broker=broker, wait_s=0)
    outcome = world.turn()
    assert isinstance(outcome.error, openai.APIConnectionError)
    assert isinstance(outcome.error.__cause__.__cause__, LeaseRefused)
    engine.script("d0", EngineReply.failure(503, "busy"))
    assert "busy" in str(world.turn().error)


def test_an_idle_connection_that_closed_is_no_failure_of_the_engine(make_world) -> None:
    engine = ScriptedEngine(then="answer")
    world = make_world(engine=engine)
    world.turn()
    engine.script("d0", EngineReply.broken())
    assert world.turn(messages=follow_up()).text == "ok"
    assert world.engines_called == ["p0", "d0", "d0", "d0"]
    assert (world.record.failovers, world.record.hops, world.record.loss) == (0, 2, "")


def test_a_connection_that_breaks_twice_is(make_world) -> None:
    engine = ScriptedEngine(then="answer")
    world = make_world(engine=engine)
    world.turn()
    engine.script("d0", EngineReply.broken(), EngineReply.broken())
    assert world.turn(messages=follow_up()).headers["x-conserve-decoder"] == "d1"


def test_a_silent_decoder_keeps_its_lease(make_world) -> None:
    engine = ScriptedEngine(then="answer")
    world = make_world(engine=engine)
    world.turn()
    engine.script("d0", EngineReply.silent())
    assert isinstance(world.turn(messages=follow_up()).error, openai.APITimeoutError)
    assert world.reports("engine_failure") == []
    assert world.turn(messages=follow_up()).headers["x-conserve-decoder"] == "d0"
    assert world.asked() == 1


def test_a_retry_of_openai_never_carries_params_again(make_world) -> None:
    engine = ScriptedEngine(then="answer").script("d0", EngineReply.silent(), EngineReply.silent())
    world = make_world(engine=engine)
    assert world.turn(max_retries=2).text == "ok"
    assert world.engines_called == ["p0", "d0", "d0", "d0"]
    params = [call.body["kv_transfer_params"] for call in world.engine.calls[1:]]
    assert [bool(p.get("do_remote_prefill")) for p in params] == [True, False, False]
    assert [record.error for record in world.turns.records] == ["timeout", "timeout", ""]


@pytest.mark.parametrize("stream", [True, False])
def test_after_the_first_byte_nothing_is_repeated(make_world, stream) -> None:
    whole = EngineReply.chat_stream("a", "b", end=False) if stream else EngineReply(chunks=(b'{"id": "x', b"y"))
    engine = ScriptedEngine(then="answer")
    world = make_world(engine=engine)
    world.turn()
    engine.script("d0", whole.dropped())
    outcome = world.turn(messages=follow_up(), stream=stream)
    assert isinstance(outcome.error, openai.APIConnectionError)
    assert world.engines_called == ["p0", "d0", "d0"]
    assert world.record.error == "stream_dropped"
    (failure,) = world.reports("engine_failure")
    assert (failure["engine_id"], failure["phase"]) == ("d0", "decode")


def test_an_error_inside_a_stream_is_recorded(make_world) -> None:
    reply = EngineReply.chat_stream("a", end=False)
    broken = EngineReply(
        content_type=reply.content_type, chunks=(*reply.chunks, *EngineReply.stream_error(message="boom").chunks)
    )
    world = make_world(engine=ScriptedEngine(then="answer").script("d0", broken))
    outcome = world.turn(stream=True)
    assert isinstance(outcome.error, openai.APIError)
    assert world.record.error == "engine_error"


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


def test_release_and_park_do_not_need_the_broker(make_world) -> None:
    world = make_world(broker=InMemoryBroker(settings=BrokerSettings(placement=PAPER)))
    world.turn()
    world.conserve.flush()
    world.broker.stop()
    assert world.run(lambda: world.conserve.park("c1"), lambda: world.conserve.apark("c1")) == 0
    assert world.run(lambda: world.conserve.release("c1"), lambda: world.conserve.arelease("c1")) == 0


# ---- the broker fails or refuses ------------------------------------------------------------------------------

QUICK = Timeouts(broker_s=0.05)


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
    world = make_world(fallback_engines=engines, timeouts=QUICK, wait_s=0)
    world.broker.stop()
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
    world.clock.advance(5_000)
    world.turn(messages=follow_up(2), conversation_id="a")
    assert world.engines_called[-2:] == ["p0", "d0"]


def test_a_broker_that_did_not_answer_is_left_alone_for_a_while(make_world) -> None:
    world = make_world(fallback_engines=["http://f0.invalid"], timeouts=QUICK, wait_s=0)
    world.broker.stop()
    world.turn()
    world.broker.start()
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
    world = make_world(
        engine=engine, fallback_engines=["http://f0.invalid", "http://f1.invalid"], timeouts=QUICK, wait_s=0
    )
    world.broker.stop()
    assert world.turn().text == "ok"
    assert sorted(world.engines_called) == ["f0", "f1"]
    assert world.record.failovers == 1


def test_a_dead_decoder_and_a_dead_broker_fall_back(make_world) -> None:
    engine = ScriptedEngine(then="answer")
    world = make_world(engine=engine, fallback_engines=["http://f0.invalid"], timeouts=QUICK, wait_s=0)
    world.turn()
    world.conserve.flush()
    world.broker.stop()
    engine.script("d0", EngineReply.unreachable())
    assert world.turn(messages=follow_up()).text == "ok"
    assert world.engines_called[-2:] == ["d0", "f0"]


def test_a_dead_decoder_and_a_dead_broker_without_fallback(make_world) -> None:
    engine = ScriptedEngine(then="answer")
    world = make_world(engine=engine, timeouts=QUICK, wait_s=0)
    world.turn()
    world.conserve.flush()
    world.broker.stop()
    engine.script("d0", EngineReply.unreachable())
    assert isinstance(world.turn(messages=follow_up()).error, openai.APIConnectionError)


@pytest.mark.parametrize("options", [{}, {"on_broker_unavailable": "raise", "fallback_engines": ["http://f0.invalid"]}])
def test_no_broker_and_no_fallback_is_a_clear_error(make_world, options) -> None:
    world = make_world(timeouts=QUICK, wait_s=0, **options)
    world.broker.stop()
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


# ---- budget ---------------------------------------------------------------------------------------------------


class SlowEngine(ScriptedEngine):
    """Takes its time on a fake clock."""

    clock = None
    takes_ms = 0

    def _next(self, call):
        self.clock.advance(self.takes_ms)
        return super()._next(call)


def slow_world(make_world, takes_ms, **options):
    engine = SlowEngine(then="answer")
    world = make_world(engine=engine, **options)
    engine.clock, engine.takes_ms = world.clock, takes_ms
    return world


def test_one_budget_over_all_hops(make_world) -> None:
    world = slow_world(make_world, 3_000)
    world.turn(timeout=httpx2.Timeout(10.0, connect=2.0))
    prefill, decode = (call.timeout for call in world.engine.calls)
    assert prefill == {"connect": 2.0, "read": 5.0, "write": 5.0, "pool": 5.0}  # at most half for the prefill
    # The params must arrive within their 20 s: waiting for a connection, connecting, sending.
    assert 5.0 < decode["write"] <= 20.0 / 3
    assert decode == {"connect": 2.0, "read": 7.0, "write": decode["write"], "pool": decode["write"]}


def test_a_spent_budget_is_a_timeout(make_world) -> None:
    world = slow_world(make_world, 12_000)
    assert isinstance(world.turn(timeout=10.0).error, openai.APITimeoutError)
    assert world.engines_called == ["p0"]
    assert world.record.error == "timeout"


def test_a_prefill_gets_no_more_than_its_limit(make_world) -> None:
    world = make_world(timeouts=Timeouts(prefill_s=1.5))
    world.turn()
    assert world.engine.calls[0].timeout["read"] == 1.5
    assert world.engine.calls[1].timeout["read"] == 600.0


def test_no_timeout_stays_none(make_world) -> None:
    world = make_world()
    world.turn(timeout=None)
    world.turn(messages=follow_up(), timeout=None)
    assert world.engine.calls[2].timeout == {"connect": None, "read": None, "write": None, "pool": None}
    assert world.engine.calls[1].timeout["read"] is None
    assert world.engine.calls[0].timeout["read"] == 60.0


# ---- side requests --------------------------------------------------------------------------------------------


def test_a_tiny_stranger_rides_on_its_conversations_decoder(world) -> None:
    world.turn()
    assert world.turn(messages=[{"role": "system", "content": "Give a title."}]).text == "ok"
    assert world.engines_called == ["p0", "d0", "d0"]
    assert world.asked() == 1
    assert (world.record.lease_id, world.record.decoder_id) == (None, "d0")
    assert "kv_transfer_params" not in world.engine.calls[-1].body
    assert "x-conserve-lease" not in world.engine.calls[-1].headers


def test_a_stranger_that_grows_gets_its_own_lease(world) -> None:
    world.turn()
    messages = [{"role": "system", "content": "You are a worker."}]
    world.turn(messages=messages)
    messages += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "go on"}]
    world.turn(messages=messages)
    assert world.asked() == 2
    assert world.record.first_turn


def test_a_strangers_host_that_fails_leads_to_a_lease(make_world) -> None:
    engine = ScriptedEngine(then="answer")
    world = make_world(engine=engine)
    world.turn()
    engine.script("d0", EngineReply.unreachable())
    assert world.turn(messages=[{"role": "system", "content": "Give a title."}]).text == "ok"
    assert world.asked() == 2


def test_riding_can_be_switched_off(make_world) -> None:
    world = make_world(stranger_bytes_max=0)
    world.turn()
    world.turn(messages=[{"role": "system", "content": "Give a title."}])
    assert world.asked() == 2


def get(world, path, **options):
    async def aget():
        response = await world.conserve.async_http_client().get(path, **options)
        return response.status_code

    return world.run(lambda: world.conserve.http_client().get(path, **options).status_code, aget)


def test_other_requests_go_to_an_engine_that_is_there(world) -> None:
    assert get(world, "/models") == 200  # the first thing many programs do: the broker knows who is there
    assert (world.engine.calls[-1].engine, world.engine.calls[-1].path) == ("d0", "/v1/models")
    world.turn()
    assert get(world, "/models?limit=3", headers={"X-ConServe-Conversation": "c1"}) == 200
    assert (world.engine.calls[-1].engine, world.engine.calls[-1].path) == ("d0", "/v1/models")
    assert "x-conserve-conversation" not in world.engine.calls[-1].headers
    assert get(world, "/models") == 200


def test_without_any_engine_other_requests_say_so(make_world) -> None:
    world = make_world(broker=InMemoryBroker(small_fleet(prefillers=1, decoders=0)))
    with pytest.raises(EngineUnavailable, match="no engine is ready for GET /v1/models"):
        get(world, "/models")
    world = make_world(timeouts=QUICK)
    world.broker.stop()
    with pytest.raises(BrokerUnavailable):
        get(world, "/models")


def test_other_requests_may_use_a_fallback_engine(make_world) -> None:
    world = make_world(fallback_engines=["http://f0.invalid/base/v1"])
    assert get(world, "/models") == 200
    assert (world.engine.calls[-1].engine, world.engine.calls[-1].path) == ("f0", "/base/v1/models")


def test_a_body_that_is_none_is_refused_like_an_engine_would(world) -> None:
    async def apost():
        return await world.conserve.async_http_client().post("/chat/completions", content=b"{nope")

    response = world.run(lambda: world.conserve.http_client().post("/chat/completions", content=b"{nope"), apost)
    assert response.status_code == 400
    assert "not JSON" in response.json()["error"]["message"]
    assert world.asked() == 0


# ---- around it ------------------------------------------------------------------------------------------------


def test_a_hook_that_fails_changes_nothing(make_world, caplog) -> None:
    def bad(record) -> None:
        raise RuntimeError("hook")

    seen = []
    world = make_world()
    world.conserve._runtime.kit.hooks = (bad, seen.append)
    with caplog.at_level(logging.ERROR):
        assert world.turn().text == "ok"
    assert len(seen) == 1
    assert "turn_hook_failed" in caplog.text


def test_closing_under_a_running_turn_lets_it_end(world) -> None:
    body = {"model": "test-model", "messages": follow_up(0), "stream": True}

    def blocking() -> str:
        with world.conserve.http_client().stream("POST", "/chat/completions", json=body) as response:
            world.conserve.close()
            return b"".join(response.iter_raw()).decode()

    async def looped() -> str:
        async with world.conserve.async_http_client().stream("POST", "/chat/completions", json=body) as response:
            await world.conserve.aclose()
            return b"".join([chunk async for chunk in response.aiter_raw()]).decode()

    assert world.run(blocking, looped).endswith("data: [DONE]\n\n")
    assert world.record.error == ""


def test_a_closed_object_says_so(world) -> None:
    world.turn()
    world.run(world.conserve.close, world.conserve.aclose)
    assert isinstance(world.turn(messages=follow_up()).error, LeaseClosed)


def test_close_may_give_everything_back(make_world) -> None:
    world = make_world()
    world.turn()
    world.run(lambda: world.conserve.close(release=True), lambda: world.conserve.aclose(release=True))
    assert world.broker.core.lease_count() == 0

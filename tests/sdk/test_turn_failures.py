"""A prefill, a transfer or a decoder fails: in both colours, on a scripted engine and the real broker core."""

from __future__ import annotations

import openai
import pytest

from conserve_sdk import LeaseRefused
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine, small_fleet
from tests.support.dialogue import follow_up

pytestmark = pytest.mark.usefixtures("make_world")

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

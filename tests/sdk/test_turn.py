"""Every rule of a turn that goes well, each scenario in both colours, on a scripted engine and the real broker core."""

from __future__ import annotations

import json
import logging

import pytest

from conserve_sdk import LeaseClosed
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine, small_fleet
from tests.support.dialogue import LONG, follow_up

pytestmark = pytest.mark.usefixtures("make_world")

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

"""Tiny strangers inside a conversation, and requests that are no turns, in both colours."""

from __future__ import annotations

import pytest

from conserve_sdk import BrokerUnavailable, EngineUnavailable, Timeouts
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine, small_fleet

pytestmark = pytest.mark.usefixtures("make_world")

QUICK = Timeouts(broker_s=0.05)


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

"""Faults of engines and broker on the emulated fleet: each ends in the right answer with the loss counted, or in a
clear error, within the seconds that the test states (its `timeout` mark)."""

from __future__ import annotations

import asyncio

import httpx2
import openai
import pytest

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet, fleet_of
from conserve_lab.stack import broker_entries
from conserve_sdk import BrokerUnavailable, ConServe, Timeouts, TurnCollector, conversation
from conserve_sdk.core import EngineDrained, EngineSpec, Role
from conserve_sdk.core.units import EngineId, ModelName, Ms, Tokens, TransferGroup
from conserve_sdk.transport._pools import AsyncEnginePool, EnginePool
from conserve_sdk.transport._runtime import monotonic_us

from .directed import DirectedBroker

pytestmark = pytest.mark.timeout(30)

LONG = "hello there " * 200
ENGINES = [{"id": "p0", "role": "prefiller"}, {"id": "d0", "role": "decoder"}, {"id": "d1", "role": "decoder"}]
QUICK = {"time_scale": 0, "tool_calls_min": 1, "handshake_timeout_ms": 200}


def follow_up(turns: int) -> list[dict]:
    messages = [{"role": "user", "content": LONG}]
    for turn in range(turns):
        messages += [{"role": "assistant", "content": "well"}, {"role": "user", "content": f"go on {turn}"}]
    return messages


class Between(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """The real network, with something happening between a prefill's answer and the decode leg."""

    def __init__(self) -> None:
        self.then = lambda: None
        self._sync, self._async = EnginePool(), AsyncEnginePool()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = self._sync.handle_request(request)
        if b'"do_remote_decode":true,"do_remote_prefill":false' in request.read():
            response.read()
            self.then()
            return httpx2.Response(response.status_code, content=response.content)
        return response

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._async.handle_async_request(request)
        if b'"do_remote_decode":true,"do_remote_prefill":false' in await request.aread():
            await response.aread()
            self.then()
            return httpx2.Response(response.status_code, content=response.content)
        return response

    def close(self) -> None:
        self._sync.close()

    async def aclose(self) -> None:
        await self._async.aclose()


@pytest.fixture
def scene(make_world):
    """An emulated fleet, a world on it, and what an engine that nothing happens to would answer."""
    opened = []

    def make(engines=ENGINES, defaults=None, **options):
        fleet = EmulatedFleet(fleet_of(engines, defaults={**QUICK, **(defaults or {})}))
        fleet.start()
        between = Between()
        broker = DirectedBroker([spec(engine) for engine in fleet.engines])
        world = make_world(broker=broker, engine_transport=between, clock_us=monotonic_us, **options)
        world.fleet, world.between = fleet, between
        opened.append((fleet, world, between))
        return world

    yield make
    for fleet, world, between in opened:
        world.run(between.close, between.aclose)
        fleet.stop()


def spec(engine) -> EngineSpec:
    return EngineSpec(
        engine_id=EngineId(engine.id),
        url=engine.url,
        role=Role(engine.role),
        model=ModelName(engine.model),
        transfer_group=TransferGroup("g"),
        kv_capacity_tokens=Tokens(10_000_000),
        max_hold_ms=Ms(30_000),
    )


def turn(world, turns=0, *, stream=False, **options):
    return world.turn(messages=follow_up(turns), model="emulated", stream=stream, max_tokens=12, **options)


def reference(world, engine="d1", turns=0) -> str:
    """The answer of an engine asked directly."""
    with openai.OpenAI(base_url=f"{world.fleet.engine(engine).url}/v1", api_key="x", max_retries=0) as client:
        answer = client.chat.completions.create(model="emulated", messages=follow_up(turns), max_tokens=12)
    return answer.choices[0].message.content


def decoded(world, engine="d0") -> list[tuple[str, int]]:
    return [(request.kv, request.status) for request in world.fleet.engine(engine).requests]


STREAM = pytest.mark.parametrize("stream", [False, True])


# ---- the prefiller --------------------------------------------------------------------------------------------


@STREAM
def test_a_dead_prefiller(scene, stream) -> None:
    world = scene()
    world.fleet.kill("p0")
    assert turn(world, stream=stream).text == reference(world)
    assert (world.record.loss, world.record.decoder_id) == ("prefill_failed", "d0")
    assert turn(world, 1, stream=stream).text == reference(world, turns=1)


@STREAM
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_prefiller_that_dies_between_the_legs(scene, policy, stream) -> None:
    world = scene(defaults={"kv_load_failure_policy": policy})
    world.between.then = lambda: world.fleet.kill("p0")
    assert turn(world, stream=stream).text == reference(world)
    # A decoder that recomputes says so in its usage, which a stream carries only when it was asked to.
    assert world.record.loss == ("" if policy == "recompute" and stream else "transfer_failed")
    assert world.record.failovers == 0


@STREAM
def test_a_transfer_that_is_refused(scene, stream) -> None:
    world = scene(defaults={"kv_load_failure_policy": "fail"})
    world.fleet.faults("p0", refuse_transfer=True)
    assert turn(world, stream=stream).text == reference(world)
    assert (world.record.loss, world.record.migrated) == ("transfer_failed", False)
    assert len(world.reports("engine_failure")) == 1


@STREAM
def test_kv_that_expired_between_the_legs(scene, stream) -> None:
    world = scene()
    world.between.then = lambda: world.fleet.faults("p0", expire_kv=True)
    assert turn(world, stream=stream).text == reference(world)
    assert world.record.loss == "transfer_failed"
    assert [status for _, status in decoded(world)] == [400, 200]


def test_a_prefiller_that_restarts_between_the_legs(scene) -> None:
    world = scene(defaults={"kv_load_failure_policy": "fail"})
    world.between.then = lambda: world.fleet.restart("p0")
    assert turn(world).text == reference(world)
    assert turn(world, 1).text == reference(world, turns=1)


def test_a_prefiller_without_a_connector(scene) -> None:
    world = scene([{**ENGINES[0], "connector": "none"}, *ENGINES[1:]])
    assert turn(world).text == reference(world)
    assert world.record.loss == "no_transfer_params"


def test_a_prefiller_that_fails(scene) -> None:
    world = scene()
    world.fleet.faults("p0", fail_next=1)
    assert turn(world).text == reference(world)
    assert world.record.loss == "prefill_failed"


def test_a_prefiller_that_never_answers_costs_its_share(scene) -> None:
    world = scene(timeouts=Timeouts(prefill_s=0.5))
    world.fleet.faults("p0", pause=True)
    assert turn(world).text == reference(world)
    assert world.record.loss == "prefill_failed"
    assert 500 <= world.record.prefill_ms < 20_000


# ---- the decoder ----------------------------------------------------------------------------------------------


@STREAM
def test_a_decoder_that_dies_between_turns(scene, stream) -> None:
    world = scene()
    turn(world)
    world.fleet.kill("d0")
    outcome = turn(world, 1, stream=stream)
    assert outcome.text == reference(world, turns=1)
    assert outcome.headers["x-conserve-decoder"] == "d1"
    assert (world.record.failovers, world.record.loss, world.record.migrated) == (1, "decoder_failed", True)
    assert turn(world, 2).headers["x-conserve-decoder"] == "d1"


@STREAM
def test_a_decoder_that_dies_before_its_first_turn(scene, stream) -> None:
    world = scene()
    world.between.then = lambda: world.fleet.kill("d0")
    assert turn(world, stream=stream).text == reference(world)
    assert world.record.decoder_id == "d1"


def test_a_decoder_that_restarts_between_turns_computes_again(scene) -> None:
    world = scene()
    turn(world)
    world.fleet.restart("d0")
    assert turn(world, 1).text == reference(world, turns=1)
    assert world.record.decoder_id == "d0"
    assert world.record.cached_tokens == 0
    assert world.record.loss == "cache_lost"


def test_a_decoder_that_is_slow_is_waited_for(scene) -> None:
    world = scene()
    turn(world)
    world.fleet.faults("d0", slow_ms=300)
    for number, stream in ((1, False), (2, True)):
        assert turn(world, number, stream=stream).text == reference(world, turns=number)
        assert (world.record.decoder_id, world.record.failovers, world.record.loss) == ("d0", 0, "")
        assert world.record.ttft_ms >= 300
    assert world.reports("engine_failure") == []


@STREAM
@pytest.mark.parametrize("why", ["re_lease", "append"])
def test_a_lease_that_moves_pulls_its_history_from_the_old_decoder(scene, why, stream) -> None:
    world = scene()
    world.broker.append_threshold_tokens = 50 if why == "append" else 0
    world.broker.directive = "re_lease" if why == "re_lease" else "none"  # said to every report of the first turn
    turn(world)
    world.reports()
    world.broker.directive = "none"
    if why == "append":
        messages = [*follow_up(0), {"role": "assistant", "content": "well"}, {"role": "user", "content": LONG * 2}]
    else:
        messages = follow_up(1)
    with openai.OpenAI(base_url=f"{world.fleet.engine('p0').url}/v1", api_key="x", max_retries=0) as client:
        expected = client.chat.completions.create(model="emulated", messages=messages, max_tokens=12)
    outcome = world.turn(messages=messages, model="emulated", stream=stream, max_tokens=12)
    assert outcome.text == expected.choices[0].message.content
    assert [body["cause"] for body in world.broker.asked] == [why]
    assert (world.record.prefill_engine_id, world.record.decoder_id, world.record.migrated) == ("d0", "d1", True)
    assert (world.record.loss, world.record.first_turn) == ("", False)
    leg = world.fleet.engine("d0").requests[-1]
    assert leg.cached_tokens > 300  # the old decoder computed what was new only
    assert [request.kv for request in world.fleet.engine("d1").requests] == ["pull+hold"]
    more = [*messages, {"role": "assistant", "content": "well"}, {"role": "user", "content": "go on"}]
    world.turn(messages=more, model="emulated", max_tokens=12)
    assert world.record.decoder_id == "d1"
    assert world.record.cached_tokens > 300


@STREAM
def test_a_giant_append_may_be_pulled_by_the_decoder_that_has_the_rest(scene, stream) -> None:
    world = scene()
    world.broker.append_threshold_tokens, world.broker.answer = 50, "append"
    turn(world)
    messages = [*follow_up(0), {"role": "assistant", "content": "well"}, {"role": "user", "content": LONG * 2}]
    with openai.OpenAI(base_url=f"{world.fleet.engine('d1').url}/v1", api_key="x", max_retries=0) as client:
        expected = client.chat.completions.create(model="emulated", messages=messages, max_tokens=12)
    outcome = world.turn(messages=messages, model="emulated", stream=stream, max_tokens=12)
    assert outcome.text == expected.choices[0].message.content
    assert (world.record.prefill_engine_id, world.record.decoder_id, world.record.migrated) == ("p0", "d0", True)
    assert (world.record.loss, world.record.epoch) == ("", 2)
    assert decoded(world) == [("pull+hold", 200), ("pull+hold", 200)]


def test_an_old_decoder_that_died_before_the_move(scene) -> None:
    world = scene()
    world.broker.directive = "re_lease"
    turn(world)
    world.reports()
    world.broker.directive = "none"
    world.fleet.kill("d0")
    assert turn(world, 1).text == reference(world, turns=1)
    assert (world.record.loss, world.record.decoder_id, world.record.failovers) == ("prefill_failed", "d1", 0)


def test_a_decoder_that_drains_goes_on_with_what_it_has(scene) -> None:
    world = scene()
    turn(world)
    world.broker._feed(EngineDrained(now_ms=world.clock.now_ms(), engine_id=EngineId("d0"), draining=True))
    assert turn(world, 1).text == reference(world, turns=1)
    assert turn(world, 2).text == reference(world, turns=2)
    assert {record.error for record in world.turns.records} == {""}
    assert turn(world, conversation_id="new").headers["x-conserve-decoder"] == "d1"


@pytest.mark.parametrize("status", [500, 503])
def test_a_decoder_that_fails(scene, status) -> None:
    world = scene()
    turn(world)
    world.fleet.faults("d0", fail_next=1, fail_status=status)
    assert turn(world, 1).text == reference(world, turns=1)
    assert world.record.decoder_id == "d1"


def test_a_stream_that_drops(scene) -> None:
    world = scene()
    turn(world)
    world.fleet.faults("d0", drop_next=1, drop_after_chunks=2)
    outcome = turn(world, 1, stream=True)
    assert isinstance(outcome.error, openai.APIConnectionError)
    assert (world.record.error, world.record.failovers) == ("stream_dropped", 0)
    assert turn(world, 1, stream=True).text == reference(world, turns=1)


def test_a_decoder_that_never_answers_ends_in_a_timeout(scene) -> None:
    world = scene()
    turn(world)
    world.fleet.faults("d0", pause=True)
    assert isinstance(turn(world, 1, timeout=0.5).error, openai.APITimeoutError)
    world.fleet.faults("d0", pause=False)
    assert turn(world, 1).text == reference(world, turns=1)
    assert world.record.decoder_id == "d0"


def test_all_decoders_dead(scene) -> None:
    world = scene(wait_s=0.2)
    turn(world)
    world.fleet.kill("d0")
    world.fleet.kill("d1")
    assert isinstance(turn(world, 1).error, openai.APIConnectionError)
    world.fleet.restart("d0")
    world.fleet.restart("d1")
    assert turn(world, 1).text == reference(world, turns=1)


# ---- the request ----------------------------------------------------------------------------------------------


@STREAM
def test_a_prompt_that_is_too_long_gets_the_engines_own_words(scene, stream) -> None:
    world = scene(defaults={"max_model_len": 512, "kv_cache_tokens": 4096})
    outcome = turn(world, stream=stream)
    assert isinstance(outcome.error, openai.BadRequestError)
    assert "maximum context length is 512" in str(outcome.error)
    assert world.record.failovers == 0


def test_params_of_an_application_reach_no_engine(scene) -> None:
    world = scene()
    forged = {"do_remote_prefill": True}  # ends a vLLM 0.32 decoder's process
    for turns in range(3):
        assert turn(world, turns, extra_body={"kv_transfer_params": forged}).error is None
    assert decoded(world) == [("pull+hold", 200), ("hold", 200), ("hold", 200)]


# ---- the broker, as a process would be ------------------------------------------------------------------------


@pytest.fixture
def stack():
    with EmulatedFleet(fleet_of(ENGINES, defaults=QUICK)) as fleet:
        config = BrokerConfig.from_mapping(
            {
                "listen": {"port": 0},
                "placement": {"preset": "paper"},
                "scrape": {"interval_ms": 100},
                "engine": broker_entries(fleet),
            }
        )
        with BrokerServer(config) as broker:
            broker.wait_until_ready(timeout_s=20, engines=3)
            yield fleet, broker


def say(client: openai.OpenAI, name: str, turns: int) -> str:
    with conversation(name):
        answer = client.chat.completions.create(model="emulated", messages=follow_up(turns), max_tokens=8)
    return answer.choices[0].message.content


@pytest.mark.timeout(60)
def test_a_broker_that_restarts_in_mid_run(stack) -> None:
    _, broker = stack
    turns = TurnCollector()
    with ConServe(broker.url, on_turn=turns, timeouts=Timeouts(broker_s=20.0)) as conserve:
        client = conserve.openai_client(max_retries=0)
        say(client, "a", 0)
        broker.kill()
        say(client, "a", 1)  # a live lease needs no broker
        broker.start()
        say(client, "a", 2)
        say(client, "b", 0)
        assert conserve.flush(20)
    assert {record.error for record in turns.records} | {record.loss for record in turns.records} == {""}
    mine = [record for record in turns.records if record.conversation_id == "a"]
    assert len({record.decoder_id for record in mine}) == 1
    assert sum(record.migrated for record in mine) == 1


@pytest.mark.timeout(20)
def test_a_broker_that_is_never_up(stack) -> None:
    fleet, broker = stack
    broker.stop()
    quick = Timeouts(broker_s=0.3)
    with ConServe(broker.url, timeouts=quick, wait_s=0, on_turn=()) as conserve, pytest.raises(BrokerUnavailable):
        say(conserve.openai_client(), "a", 0)
    engines = [fleet.engine("d0").url, fleet.engine("d1").url]
    turns = TurnCollector()
    with ConServe(broker.url, timeouts=quick, wait_s=0, fallback_engines=engines, on_turn=turns) as conserve:
        for turn_number in range(3):
            say(conserve.openai_client(), "a", turn_number)
    assert [record.loss for record in turns.records] == ["broker_unavailable"] * 3
    assert len({record.decoder_id for record in turns.records}) == 1


async def test_async_conversations_through_a_real_broker(stack) -> None:
    _, broker = stack
    turns = TurnCollector()
    async with ConServe(broker.url, on_turn=turns) as conserve:
        client = conserve.async_openai_client(max_retries=0)

        async def talk(name: str) -> None:
            for turns_so_far in range(3):
                with conversation(name):
                    stream = await client.chat.completions.create(
                        model="emulated", messages=follow_up(turns_so_far), max_tokens=8, stream=True
                    )
                    assert [chunk async for chunk in stream]

        await asyncio.gather(*(talk(f"c{number}") for number in range(6)))
        assert await asyncio.to_thread(conserve.flush)
        for number in range(6):
            assert await conserve.arelease(f"c{number}") == 1
    assert sum(record.migrated for record in turns.records) == 6
    assert {record.loss for record in turns.records} == {""}

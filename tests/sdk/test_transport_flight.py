"""Turns at the same time, and turns that are left: gates instead of sleeps."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import httpx2
import openai
import pytest

from conserve_sdk import LeaseRefused, conversation
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine, small_fleet

MESSAGES = [{"role": "user", "content": "hello " * 400}]
PATIENCE_S = 20


class Gate(ScriptedEngine):
    """Holds requests to one engine until it is opened; `arrived` says that one is there."""

    def __init__(self, *replies, holds: str, **options) -> None:
        super().__init__(*replies, then="answer", **options)
        self.holds = holds
        self.arrived = threading.Event()
        self.opened = threading.Event()

    def handle_request(self, request):
        if self._is_held(request):
            self.arrived.set()
            assert self.opened.wait(PATIENCE_S)
        return super().handle_request(request)

    async def handle_async_request(self, request):
        if self._is_held(request):
            self.arrived.set()
            await until(self.opened.is_set)
        return await super().handle_async_request(request)

    def _is_held(self, request) -> bool:
        return request.url.host.startswith(self.holds) and not self.opened.is_set()


def followers(world) -> int:
    flights = world.conserve._runtime.kit.registry._flights
    return sum(len(flight.followers) for flight in flights.values())


async def until(condition) -> None:
    with anyio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 -- what is waited for happens in threads, too
            await anyio.sleep(0.005)


def until_blocking(condition) -> None:
    asyncio.run(until(condition))


def four_turns(world) -> list:
    """Start four first turns of one lineage, open the gate once three of them wait for the first."""
    if world.colour == "sync":
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(world.turn) for _ in range(4)]
            until_blocking(lambda: followers(world) == 3)
            world.engine.opened.set()
            return [future.result(PATIENCE_S) for future in futures]

    async def go() -> list:
        tasks = [
            asyncio.ensure_future(world.aturn("c1", False, 0, {"model": "test-model", "messages": MESSAGES}))
            for _ in range(4)
        ]
        await until(lambda: followers(world) == 3)
        world.engine.opened.set()
        return await asyncio.gather(*tasks)

    return world.runner.run(go())


def test_four_first_turns_at_once_make_one_prefill(make_world) -> None:
    world = make_world(engine=Gate(holds="p0"))
    assert [outcome.text for outcome in four_turns(world)] == ["ok"] * 4
    assert sorted(world.engines_called) == ["d0"] * 4 + ["p0"]
    assert world.asked() == 1
    pulled = [call for call in world.engine.calls_to("d0") if call.body["kv_transfer_params"].get("do_remote_prefill")]
    assert len(pulled) == 1
    assert sum(record.migrated for record in world.turns.records) == 1
    reports = world.reports("turn_finished")
    assert [report["idle"] for report in reports].count(True) >= 1
    assert reports[-1]["idle"]


def test_a_leader_that_fails_makes_way_for_the_next(make_world) -> None:
    world = make_world(engine=Gate(EngineReply.failure(401), holds="p0"))
    world.engine.script("d0", EngineReply.silent())
    outcomes = four_turns(world)
    assert sorted(outcome.text for outcome in outcomes) == ["", "ok", "ok", "ok"]
    assert world.asked() == 1


def test_the_broker_refuses_all_of_them(make_world) -> None:
    world = make_world(engine=Gate(holds="p0"), wait_s=0)
    outcomes = [world.turn(model="unheard-of") for _ in range(2)]
    assert all(isinstance(outcome.error, LeaseRefused) for outcome in outcomes)
    assert followers(world) == 0


def test_waiting_for_another_turn_is_part_of_the_budget(make_world) -> None:
    world = make_world(engine=Gate(holds="p0"))
    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(world._turn, "c1", False, 0, {"model": "test-model", "messages": MESSAGES})
        assert world.engine.arrived.wait(PATIENCE_S)
        world.clock.advance(0)
        # The fake clock stands still, so the wait ends by its own timeout and the budget is asked again.
        follower = pool_turn(world, timeout=0.05)
        until_blocking(lambda: followers(world) >= 1)
        world.clock.advance(60)
        assert isinstance(follower.result(PATIENCE_S).error, openai.APITimeoutError)
        world.engine.opened.set()
        assert leader.result(PATIENCE_S).text == "ok"


def pool_turn(world, **options):
    """A turn in a thread of its own, whatever the colour."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(world.turn, messages=MESSAGES, **options)
    pool.shutdown(wait=False)
    return future


def test_threads_and_event_loops_share_one_flight(make_world) -> None:
    world = make_world(engine=Gate(holds="p0"))
    with ThreadPoolExecutor(2) as pool:
        blocking = pool.submit(world._turn, "c1", False, 0, {"model": "test-model", "messages": MESSAGES})
        assert world.engine.arrived.wait(PATIENCE_S)
        looped = pool.submit(asyncio.run, world.aturn("c1", False, 0, {"model": "test-model", "messages": MESSAGES}))
        until_blocking(lambda: followers(world) == 1)
        world.engine.opened.set()
        assert [blocking.result(PATIENCE_S).text, looped.result(PATIENCE_S).text] == ["ok", "ok"]
    assert sorted(world.engines_called) == ["d0", "d0", "p0"]


# ---- leaving --------------------------------------------------------------------------------------------------


async def cancelled(world, gate: Gate) -> None:
    task = asyncio.ensure_future(world.aturn("c1", True, 0, {"model": "test-model", "messages": MESSAGES}))
    await until(gate.arrived.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.opened.set()


@pytest.mark.parametrize(("holds", "then"), [("p0", ["p0", "d0"]), ("d0", ["p0", "d0"])])
def test_a_cancelled_first_turn_leaves_nothing_behind(make_async_world, holds, then) -> None:
    gate = Gate(holds=holds)
    world = make_async_world(engine=gate)
    world.runner.run(cancelled(world, gate))
    assert world.record.error == "client_cancelled"
    assert world.conserve._runtime.kit.registry._flights == {}
    called = len(world.engines_called)
    assert world.turn().text == "ok"
    # Cancelled in the prefill, the migration is still to be made; cancelled after it, its params are spent.
    assert world.engines_called[called:] == (then if holds == "p0" else ["d0"])
    assert sum(record.migrated for record in world.turns.records) == (1 if holds == "p0" else 0)
    assert world.asked() == 1


def test_a_cancelled_wait_for_admission_is_withdrawn(make_async_world) -> None:
    broker = InMemoryBroker(small_fleet(decoders=1), settings=BrokerSettings(placement=PAPER), waiting="block")
    big = EngineReply.chat(prompt_tokens=99_000)
    world = make_async_world(broker=broker, engine=ScriptedEngine(then="answer").script("d0", big))
    world.turn(conversation_id="a")
    world.conserve.flush()

    async def go() -> None:
        waiting = {"model": "test-model", "messages": [{"role": "user", "content": "other " * 2_000}]}
        task = asyncio.ensure_future(world.aturn("b", False, 0, waiting))
        await until(lambda: broker.core.waiting() == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    world.runner.run(go())
    assert broker.core.waiting() == 0
    assert world.record.error == "client_cancelled"


class Endless(ScriptedEngine):
    """Streams until it is closed."""

    def __init__(self) -> None:
        super().__init__(then="answer")
        self.closed = threading.Event()

    def _play(self, request, content):
        response = super()._play(request, content)
        if response.headers["content-type"] == "text/event-stream":
            response.stream = _EndlessChunks(self.closed)
        return response


class _EndlessChunks(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    def __init__(self, closed) -> None:
        self._closed = closed

    def __iter__(self):
        while not self._closed.is_set():
            yield EngineReply.chat_stream("x", end=False).chunks[-1]

    async def __aiter__(self):
        while not self._closed.is_set():
            await asyncio.sleep(0)
            yield EngineReply.chat_stream("x", end=False).chunks[-1]

    def close(self) -> None:
        self._closed.set()

    async def aclose(self) -> None:
        self._closed.set()


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_stream_that_is_left_is_ended_at_the_engine(make_world, how) -> None:
    engine = Endless()
    world = make_world(engine=engine)

    def blocking() -> None:
        with conversation("c1"):
            stream = world.conserve.openai_client().chat.completions.create(
                model="test-model", messages=MESSAGES, stream=True
            )
        for seen, _ in enumerate(stream):
            if seen == 3:
                break
        if how == "close":
            stream.close()
        del stream
        gc.collect()  # openai's streams are cycles

    async def looped() -> None:
        with conversation("c1"):
            stream = await world.conserve.async_openai_client().chat.completions.create(
                model="test-model", messages=MESSAGES, stream=True
            )
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == 3:
                break
        if how == "close":
            await stream.close()
        del stream
        # Each collection lets go of one layer of generators, the loop then closes it.
        await until(lambda: gc.collect() >= 0 and engine.closed.is_set())

    world.run(blocking, looped)
    assert engine.closed.wait(PATIENCE_S)
    assert world.record.error == "client_cancelled"
    world.conserve.flush()
    assert world.broker.core.lease_count() == 1


def test_cancelling_in_mid_stream_ends_it_at_the_engine(make_async_world) -> None:
    engine = Endless()
    world = make_async_world(engine=engine)

    async def read(started: asyncio.Event) -> None:
        with conversation("c1"):
            stream = await world.conserve.async_openai_client().chat.completions.create(
                model="test-model", messages=MESSAGES, stream=True
            )
            async for _ in stream:
                started.set()

    async def go() -> None:
        started = asyncio.Event()
        task = asyncio.ensure_future(read(started))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    world.runner.run(go())
    assert engine.closed.is_set()
    assert world.record.error == "client_cancelled"


# ---- an event loop that stands still --------------------------------------------------------------------------


def test_params_that_grew_old_in_a_blocked_event_loop_are_not_used(make_async_world) -> None:
    """The prefill's answer waits in the socket while the application blocks the loop past the deadline."""

    class Blocking(ScriptedEngine):
        async def handle_async_request(self, request):
            response = await super().handle_async_request(request)
            if request.url.host.startswith("p0"):
                world.clock.advance(25_000)
            return response

    world = make_async_world(engine=Blocking(then="answer"))
    assert world.turn().text == "ok"
    assert world.engine.calls_to("d0")[0].body["kv_transfer_params"] == {"do_remote_decode": True}
    assert world.record.loss == "transfer_expired"


def test_a_blocking_client_in_an_event_loop_is_warned_about(make_world, caplog) -> None:
    world = make_world()

    async def go() -> None:
        world._turn("c1", False, 0, {"model": "test-model", "messages": MESSAGES})
        world._turn("c1", False, 0, {"model": "test-model", "messages": MESSAGES})

    asyncio.run(go())
    assert sum("stalls it" in record.message for record in caplog.records) == 1

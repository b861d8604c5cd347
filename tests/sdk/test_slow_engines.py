"""Engines that take their time, on a fake clock: leases outlive the wait, or the turn ends as the application said."""

from __future__ import annotations

import httpx2
import openai
import pytest

from conserve_sdk.testing import EngineReply, ScriptedEngine

LONG = "hello " * 400
MORE = [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "more"}]


def history(turns: int) -> list[dict]:
    return [{"role": "user", "content": LONG}, *MORE * turns]


class Passing:
    """Lets time pass while an engine is waited for, with what the background thread does in it."""

    def __init__(self, world) -> None:
        self.world = world
        world.conserve._runtime.reporter._threaded = False  # the test is its thread

    def pass_ms(self, ms: int) -> None:
        reporter = self.world.conserve._runtime.reporter
        for _ in range(ms // 5_000):
            self.world.clock.advance(5_000)
            reporter.pump(self.world.clock.now_ms())


class Waiting(ScriptedEngine):
    """An engine out of KV: the next request waits until room appears, then is answered as if nothing had been."""

    wait_ms = 0
    passing: Passing

    def _next(self, call):
        if call.engine == "d0" and self.wait_ms:
            self.passing.pass_ms(self.wait_ms)
        return super()._next(call)


class Trickling(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A stream with a long silence before each of its chunks."""

    def __init__(self, reply: EngineReply, passing: Passing, silence_ms: int) -> None:
        self.reply, self.passing, self.silence_ms = reply, passing, silence_ms

    def __iter__(self):
        for chunk in self.reply.chunks:
            self.passing.pass_ms(self.silence_ms)
            yield chunk

    async def __aiter__(self):
        for chunk in self:
            yield chunk


def waiting_world(make_world, wait_ms: int):
    engine = Waiting(then="answer")
    world = make_world(engine=engine)
    engine.passing = Passing(world)
    world.turn()
    engine.wait_ms = wait_ms
    return world, engine


def test_a_long_wait_for_room_outlives_the_lease_and_loses_nothing(make_world) -> None:
    """Ten minutes are ten lives of a lease; it is renewed because its turn is running."""
    world, engine = waiting_world(make_world, 600_000)
    outcome = world.turn(messages=history(1), timeout=None)
    assert outcome.text == "ok"
    assert world.record.ttft_ms == 600_000
    assert world.asked("/v1/renewals") >= 10
    engine.wait_ms = 0
    world.turn(messages=history(2))
    assert world.engines_called == ["p0", "d0", "d0", "d0"]
    assert world.asked() == 1
    assert (world.record.epoch, world.record.first_turn, world.record.loss) == (1, False, "")
    assert world.reports("engine_failure") == []


def test_a_first_turn_that_waits_for_room_keeps_its_transfer(make_world) -> None:
    """The params were redeemed and sent in time; how long the engine then queues is its own affair."""
    engine = Waiting(then="answer")
    world = make_world(engine=engine)
    engine.passing, engine.wait_ms = Passing(world), 120_000
    assert world.turn(timeout=None).text == "ok"
    assert (world.record.migrated, world.record.loss, world.record.ttft_ms) == (True, "", 120_000)


def test_a_stream_with_long_silences_keeps_its_lease(make_world) -> None:
    world = make_world()
    passing = Passing(world)
    world.turn()
    inner = world.engine._play

    def play(request, content):
        inner(request, content)
        stream = Trickling(EngineReply.chat_stream("a", "b", "c"), passing, 90_000)
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=stream)

    world.engine._play = play
    assert world.turn(messages=history(1), stream=True, timeout=None).text == "abc"
    assert max(world.record.tbt_us) == 90_000_000
    world.engine._play = inner
    world.turn(messages=history(2))
    assert world.asked() == 1
    assert world.record.epoch == 1


def test_a_wait_that_is_too_long_for_the_application_keeps_the_lease(make_world) -> None:
    """A read that times out proves nothing about the engine: it may be busy and well."""
    world, engine = waiting_world(make_world, 0)
    engine.script("d0", EngineReply.silent())
    assert isinstance(world.turn(messages=history(1)).error, openai.APITimeoutError)
    world.turn(messages=history(1))
    assert (world.record.decoder_id, world.asked()) == ("d0", 1)
    assert world.reports("engine_failure") == []


@pytest.mark.parametrize("pause_ms", [30_000, 3_600_000])
def test_a_tool_that_takes_its_time_keeps_the_lease_within_reason(make_world, pause_ms) -> None:
    engine = ScriptedEngine(then="answer").script("d0", EngineReply.chat(tool="look"))
    world = make_world(engine=engine)
    passing = Passing(world)
    world.turn()
    passing.pass_ms(pause_ms)
    world.turn(messages=history(1))
    kept = pause_ms < 1_800_000  # half an hour without a sign: the program may have gone
    assert (world.asked(), world.record.first_turn) == ((1, False) if kept else (2, True))

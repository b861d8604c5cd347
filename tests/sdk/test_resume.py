"""Conversations that pause: idle runs, parked humans, hours later, another process, a process that just ends."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap

import httpx2
import pytest

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet, fleet_of
from conserve_lab.stack import broker_entries
from conserve_sdk import ConServe, conversation
from conserve_sdk.testing import EngineReply, ScriptedEngine

LONG = "hello there " * 200


def history(turns: int = 0) -> list[dict]:
    messages = [{"role": "user", "content": LONG}]
    for turn in range(turns):
        messages += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": f"go on {turn}"}]
    return messages


# ---- idle -----------------------------------------------------------------------------------------------------


@pytest.fixture
def waiting(make_world):
    """A world whose run ended in a tool call, and whose background thread is the test itself."""
    world = make_world(engine=ScriptedEngine(then="answer").script("d0", EngineReply.chat(tool="look")))
    world.conserve._runtime.reporter._threaded = False
    world.turn()
    return world


def renewals(world) -> int:
    """What the background thread would do within the next minute."""
    before = world.asked("/v1/renewals")
    reporter = world.conserve._runtime.reporter
    for _ in range(6):
        world.clock.advance(10_000)
        reporter.pump(world.clock.now_ms())
    return world.asked("/v1/renewals") - before


def test_a_run_that_ended_in_a_tool_call_is_idle_when_it_says_so(waiting) -> None:
    world = waiting
    world.reports()
    assert renewals(world) > 0  # the tool may be at work
    assert world.broker.core.lease_count() == 1
    exchanges = len(world.broker.exchanges)
    assert world.conserve.idle("c1") == 1
    assert world.conserve.idle("c1") == 0
    assert world.conserve.idle("nobody") == 0
    assert len(world.broker.exchanges) == exchanges  # no I/O
    assert renewals(world) == 0
    world.clock.advance(60_000)
    assert world.broker.core.lease_count() == 0


def test_a_turn_after_idle_uses_the_lease_and_starts_a_new_tool_loop(waiting) -> None:
    world = waiting
    world.conserve.idle("c1")
    world.clock.advance(20_000)
    world.turn(messages=[{"role": "user", "content": "hello " * 400}, *history(1)[1:]])
    assert world.engines_called == ["p0", "d0", "d0"]
    assert world.record.ttfet_ms == 0  # not the 20 s since the run before


def test_ids_that_need_hashing_are_found(make_world) -> None:
    world = make_world(engine=ScriptedEngine(then="answer").script("d0", EngineReply.chat(tool="look")))
    world.turn(conversation_id="two words")
    assert world.conserve.idle("two words") == 1


# ---- release --------------------------------------------------------------------------------------------------


def release(world) -> int:
    return world.run(lambda: world.conserve.release("c1"), lambda: world.conserve.arelease("c1"))


def test_releasing_twice_or_what_another_process_released_is_no_error(make_world) -> None:
    one = make_world()
    two = make_world(broker=one.broker)
    one.turn()
    two.turn()
    assert [release(one), release(one)] == [1, 0]
    assert release(two) == 0  # the report of its turn was told that the lease is gone
    assert one.broker.core.lease_count() == 0
    assert (one.turn().error, one.record.first_turn) == (None, True)  # and goes on whenever it wants to


# ---- hours later ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parked", [False, True])
def test_hours_later_the_next_turn_is_a_first_turn(world, parked) -> None:
    world.turn()
    if parked:
        assert world.run(lambda: world.conserve.park("c1"), lambda: world.conserve.apark("c1")) == 1
    world.reports()
    world.clock.advance(3 * 3_600_000)
    assert world.broker.core.lease_count() == 0  # nobody kept KV for a human
    assert world.turn(messages=[{"role": "user", "content": "hello " * 400}, *history(1)[1:]]).text == "ok"
    assert world.engines_called == ["p0", "d0", "p0", "d0"]
    assert (world.record.first_turn, world.record.loss, world.record.migrated) == (True, "", True)


def test_hours_later_in_another_process(make_world) -> None:
    one = make_world()
    one.turn()
    one.run(one.conserve.close, one.conserve.aclose)
    one.clock.advance(3 * 3_600_000)
    two = make_world(broker=one.broker)
    two.turn(messages=[{"role": "user", "content": "hello " * 400}, *history(1)[1:]])
    assert two.engines_called == ["p0", "d0"]
    assert two.record.first_turn


# ---- another process, over a real broker ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack():
    engines = [{"id": "p0", "role": "prefiller"}, {"id": "d0", "role": "decoder"}, {"id": "d1", "role": "decoder"}]
    with EmulatedFleet(fleet_of(engines, defaults={"time_scale": 0})) as fleet:
        config = BrokerConfig.from_mapping(
            {
                "listen": {"port": 0},
                "placement": {"preset": "paper"},
                "scrape": {"interval_ms": 100},
                "engine": broker_entries(fleet),
            }
        )
        with BrokerServer(config) as broker:
            broker.wait_until_ready(timeout_s=60, engines=3)
            yield fleet, broker


def run_elsewhere(program: str, *, pickled: object = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program)]
    data = pickle.dumps(pickled).hex()
    return subprocess.run(command, input=data, capture_output=True, text=True, timeout=120, check=False)


GO_ON = """
    import pickle, sys
    conserve, block, messages = pickle.loads(bytes.fromhex(sys.stdin.read()))
    with conserve, block:
        raw = conserve.openai_client(max_retries=0).chat.completions.with_raw_response.create(
            model="emulated", messages=messages, max_tokens=4)
        print(raw.headers["x-conserve-lease"], raw.headers["x-conserve-decoder"], "x-conserve-prefiller" in raw.headers)
"""


def test_a_pickled_conversation_goes_on_in_another_process(stack) -> None:
    _, broker = stack
    with ConServe(broker.url) as conserve:
        block = conversation("travels", lineage="main")
        with block:
            raw = conserve.openai_client().chat.completions.with_raw_response.create(
                model="emulated", messages=history(), max_tokens=4
            )
        assert conserve.flush(60)
        first = (raw.headers["x-conserve-lease"], raw.headers["x-conserve-decoder"])
        done = run_elsewhere(GO_ON, pickled=(conserve, block, history(1)))
        assert done.stderr == ""
        assert done.stdout.split() == [*first, "False"]  # the same lease, and no second prefill
        assert conserve.release("travels") == 1
        done = run_elsewhere(GO_ON, pickled=(conserve, block, history(2)))
        lease_id, _, migrated = done.stdout.split()
        assert (lease_id != first[0], migrated) == (True, "True")  # a first turn again


def ends_without_close(broker_url: str, name: str) -> subprocess.CompletedProcess[str]:
    return run_elsewhere(f"""
        from conserve_sdk import ConServe, conversation
        conserve = ConServe({broker_url!r})
        with conversation({name!r}):
            conserve.openai_client().chat.completions.create(
                model="emulated", messages=[{{"role": "user", "content": {LONG!r}}}], max_tokens=4)
    """)


def test_a_process_that_just_ends_has_reported_its_turns(stack) -> None:
    _, broker = stack
    before = httpx2.get(f"{broker.url}/v1/fleet").json()["migrations_total"]
    done = ends_without_close(broker.url, "leaves")
    assert (done.returncode, done.stderr) == (0, "")
    assert httpx2.get(f"{broker.url}/v1/fleet").json()["migrations_total"] == before + 1
    with ConServe(broker.url) as conserve:  # its lease lives on: another process may take it over
        with conversation("leaves"):
            raw = conserve.openai_client().chat.completions.with_raw_response.create(
                model="emulated", messages=history(1), max_tokens=4
            )
        assert "x-conserve-prefiller" not in raw.headers
        assert conserve.release("leaves") == 1


def test_a_process_whose_broker_is_gone_ends_quietly() -> None:
    done = run_elsewhere("""
        import httpx2
        from conserve_sdk import ConServe, conversation
        from conserve_sdk.testing import InMemoryBroker, ScriptedEngine
        broker = InMemoryBroker()
        conserve = ConServe(broker.url, broker_transport=broker, engine_transport=ScriptedEngine(then="answer"))
        with conversation("c"):
            conserve.openai_client().chat.completions.create(
                model="test-model", messages=[{"role": "user", "content": "hello"}])
        broker.stop()
    """)
    assert (done.returncode, done.stdout) == (0, "")
    assert "Traceback" not in done.stderr

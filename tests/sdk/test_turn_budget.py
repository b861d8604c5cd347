"""One budget of time over all hops of a turn, in both colours."""

from __future__ import annotations

import httpx2
import openai
import pytest

from conserve_sdk import Timeouts
from conserve_sdk.testing import ScriptedEngine
from tests.support.dialogue import follow_up

pytestmark = pytest.mark.usefixtures("make_world")


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

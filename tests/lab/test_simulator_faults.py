"""Engines die and drain while conversations run: nobody is lost, and the broker's invariants hold."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from conserve_lab.hardware import engine_kind
from conserve_lab.simulator import POLICIES, simulate, summarise
from conserve_lab.simulator.agent import Agent
from conserve_lab.simulator.faults import RESTART_US, Fault, FaultKind
from conserve_lab.simulator.fleet import Fleet
from conserve_lab.simulator.gaps import Gaps
from conserve_lab.simulator.invariants import Invariants
from conserve_lab.simulator.kernel import Kernel
from conserve_lab.simulator.run import WARM_US, Outcome
from conserve_lab.workloads import generate
from conserve_sdk.core import Broker
from conserve_sdk.core.decisions import Granted, LeaseDropped
from conserve_sdk.core.events import TurnFinished
from conserve_sdk.core.lease import Lease
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import Ms
from conserve_sdk.core.vocabulary import DropReason, EngineState

KIND = engine_kind("a40/qwen3-0.6b")


def run(name: str, *faults: Fault) -> Outcome:
    conversations = generate("coding", conversations=12, seed=1)
    return simulate(conversations, POLICIES[name], [KIND] * 4, per_s=2, seed=1, burst=4, faults=faults)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_conversation_outlives_two_dead_engines(name: str) -> None:
    outcome = run(name, *(Fault(kind=FaultKind.FAIL, at_us=at_us) for at_us in (3_000_000, 5_000_000)))
    assert summarise(outcome)["lost_calls"] > 0
    for story, conversation in zip(outcome.stories, outcome.conversations, strict=True):
        assert len(story.first_tokens_us) == len(conversation.turns)
        assert story.first_tokens_us == sorted(story.first_tokens_us)
    assert {engine.incarnation for engine in outcome.engines} == {1, 2}


def test_conversations_of_an_only_decoder_wait_until_it_is_back() -> None:
    policy = replace(POLICIES["paper"], prefill_share=0.75)
    conversations = generate("swe-padded", conversations=6, seed=2)
    fault = Fault(kind=FaultKind.FAIL, at_us=1_500_000)
    outcome = simulate(conversations, policy, [KIND] * 4, per_s=4, seed=2, faults=(fault,))
    assert summarise(outcome)["lost_calls"] > 0
    assert all(story.done_us > WARM_US + fault.at_us + RESTART_US for story in outcome.stories)


def test_a_first_turn_whose_prefiller_dies_is_prefilled_on_the_decoder() -> None:
    kernel = Kernel()
    fleet = Fleet(kernel, POLICIES["paper"], [KIND] * 4)
    (conversation,) = generate("swe-padded", conversations=1, seed=2)
    agent = Agent(fleet, conversation, number=0, gaps=Gaps(), finished=lambda: None)
    agent.start()
    kernel.at(200_000, lambda: fleet.prefillers[0].fail(back_after_us=RESTART_US))
    while not agent.story.done_us:
        assert kernel.step()
    assert (agent.story.lost_calls, agent.story.migrations) == (1, 0)


def test_a_drained_engine_gets_nothing_new_and_its_conversations_move() -> None:
    drained = run("a2", Fault(kind=FaultKind.DRAIN, at_us=5_000_000))
    assert summarise(drained)["lost_calls"] == 0
    assert drained.moved_tokens > run("a2").moved_tokens
    assert run("router-sticky", Fault(kind=FaultKind.DRAIN, at_us=1)).engines[-1].model.counters.steps == 0


LEASE = cast("Lease", SimpleNamespace(lease_id="l1", prefiller=None, mode="local", expires_at_ms=Ms(100)))


def invariants(**view: Any) -> Invariants:
    core = SimpleNamespace(engines=lambda: (SimpleNamespace(engine_id="d0", **view),))
    return Invariants(cast("Broker", core), BrokerSettings())


def lease(**changes: Any) -> Lease:
    decoder = SimpleNamespace(engine_id="d0", incarnation="1")
    return cast("Lease", SimpleNamespace(**{**vars(LEASE), "decoder": decoder, **changes}))


def test_a_broken_promise_is_noticed() -> None:
    ready = invariants(state=EngineState.READY, incarnation="1")
    held = lease()
    ready.granted(Granted(request_id=cast("Any", "q"), lease=held, reused=False))
    with pytest.raises(AssertionError, match="changed its engines"):
        ready.granted(Granted(request_id=cast("Any", "q"), lease=lease(prefiller="p0"), reused=True))
    with pytest.raises(AssertionError, match="expired before its TTL"):
        ready.dropped(LeaseDropped(lease=held, reason=DropReason.EXPIRED), now_ms=Ms(99))
    ready.dropped(LeaseDropped(lease=held, reason=DropReason.EXPIRED), now_ms=Ms(100))
    report = cast("TurnFinished", SimpleNamespace(migrated=True, lease_id="l2"))
    ready.reported(report)
    with pytest.raises(AssertionError, match="moved its KV twice"):
        ready.reported(report)
    for view, said in (
        ({"state": EngineState.DRAINING, "incarnation": "1"}, "on an engine that is draining"),
        ({"state": EngineState.READY, "incarnation": "2"}, "on an engine that is no more"),
    ):
        with pytest.raises(AssertionError, match=said):
            invariants(**view).granted(Granted(request_id=cast("Any", "q"), lease=held, reused=False))

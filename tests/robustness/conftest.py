"""Engines on real sockets, and `ConServe` objects in front of them that must leave nothing behind."""

from __future__ import annotations

import pytest

from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack
from conserve_sdk import ConServe, TurnCollector
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import InMemoryBroker
from tests.support.loopback import LoopbackEngine, specs
from tests.support.processes import fork_and_wait

__all__ = ["fork_and_wait"]


@pytest.fixture(scope="package")
def stack():
    """A real broker before real (emulated) engines: one prefiller, two decoders, every first turn migrates."""
    fleet = default_fleet(prefillers=1, decoders=2, time_scale=0.0, tool_calls_min=0, tool_calls_max=0)
    with LocalStack(fleet=fleet, preset="paper") as running:
        yield running


@pytest.fixture
def engine():
    """Make loopback engines."""
    made: list[LoopbackEngine] = []

    def make(*script: str, then: str = "answer") -> LoopbackEngine:
        made.append(LoopbackEngine(*script, then=then))
        return made[-1]

    yield make
    for running in made:
        running.close()


@pytest.fixture
def front():
    """Make a `ConServe` object before loopback engines; closed at the end."""
    made: list[ConServe] = []

    def make(options=None, **engines: LoopbackEngine) -> ConServe:
        broker = InMemoryBroker(specs(*engines.items()), settings=BrokerSettings(placement=PAPER))
        turns = TurnCollector()
        conserve = ConServe(broker.url, broker_transport=broker, on_turn=turns, **(options or {}))
        conserve.broker, conserve.turns = broker, turns
        made.append(conserve)
        return conserve

    yield make
    for conserve in made:
        conserve.close()


def at_rest(conserve: ConServe) -> None:
    """No turn is counted as running, no first turn is waited for, no lease is kept in use."""
    kit = conserve._runtime.kit
    assert not kit._running
    assert kit.registry._flights == {}
    assert kit.registry._in_use == {}


@pytest.fixture(name="at_rest")
def at_rest_fixture():
    """See `at_rest`."""
    return at_rest

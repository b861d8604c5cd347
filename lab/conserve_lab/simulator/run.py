"""One run: a workload, a policy, a load, a seed; and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conserve_lab.hardware import EngineKind
from conserve_lab.simulator.agent import Agent, Story
from conserve_lab.simulator.engine import SimulatedEngine
from conserve_lab.simulator.faults import Fault, plan_faults
from conserve_lab.simulator.fleet import Fleet
from conserve_lab.simulator.gaps import Gaps
from conserve_lab.simulator.kernel import Kernel
from conserve_lab.simulator.policies import Policy
from conserve_lab.workloads import Conversation, poisson_arrivals

WARM_US = 60_000_000
"""The fleet has been up for so long when the first conversation may arrive: the broker has seen its engines idle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Everything that was measured, raw.

    Attributes:
        span_us: from when the first conversation may arrive to the last token.
        events: things that happened in virtual time, for the speed of the simulator.
    """

    conversations: tuple[Conversation, ...]
    stories: tuple[Story, ...]
    last_gaps: Gaps
    span_us: int
    engines: tuple[SimulatedEngine, ...]
    events: int

    @property
    def energy_nj(self) -> int:
        """Of the whole fleet over the whole span, idle power included."""
        return sum(engine.energy.work_nj + engine.kind.power.idle_nj(self.span_us) for engine in self.engines)

    @property
    def moved_tokens(self) -> int:
        """KV that went from engine to engine."""
        return sum(engine.moved_tokens for engine in self.engines)


def simulate(
    conversations: Sequence[Conversation],
    policy: Policy,
    kinds: Sequence[EngineKind],
    *,
    per_s: float,
    seed: int,
    burst: int = 1,
    faults: tuple[Fault, ...] = (),
) -> Outcome:
    """Let the conversations arrive, `per_s` a second and `burst` at a time, and play them to their ends.

    The same arguments give the same outcome, to the microsecond.
    """
    kernel = Kernel()
    fleet = Fleet(kernel, policy, kinds)
    plan_faults(fleet, faults, after_us=WARM_US)
    gaps = Gaps()
    left = len(conversations)
    agents: list[Agent] = []

    def finished() -> None:
        nonlocal left
        left -= 1
        if not left and fleet.broker is not None:
            fleet.broker.stop()

    def arrive(number: int, conversation: Conversation) -> None:
        agent = Agent(fleet, conversation, number=number, gaps=gaps, finished=finished)
        agents.append(agent)
        agent.start()

    arrivals = poisson_arrivals(len(conversations), per_s=per_s, seed=seed, burst=burst)
    for number, (at_us, conversation) in enumerate(zip(arrivals, conversations, strict=True)):
        kernel.at(WARM_US + at_us, lambda number=number, conversation=conversation: arrive(number, conversation))  # type: ignore[misc]
    events = 0
    while left and kernel.step():
        events += 1
    assert not left, f"{left} conversations never ended"
    _check(fleet)
    return Outcome(
        conversations=tuple(conversations),
        stories=tuple(agent.story for agent in agents),
        last_gaps=gaps,
        span_us=max(agent.story.done_us for agent in agents) - WARM_US,
        engines=tuple(fleet.engines),
        events=events,
    )


def _check(fleet: Fleet) -> None:
    """All leases are back, and every block is accounted for."""
    if fleet.broker is not None:
        assert fleet.broker.core.lease_count() == 0, "leases are left after the last conversation"
        assert all(view.kv_leased_tokens == 0 for view in fleet.broker.core.engines()), "the ledger is not empty"
    for engine in fleet.engines:
        engine.settle()
        engine.model.check()

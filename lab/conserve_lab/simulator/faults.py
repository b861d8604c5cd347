"""What goes wrong in a run, at a given time: an engine dies and comes back, or is drained."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from conserve_lab.simulator.fleet import Fleet

RESTART_US = 30_000_000
"""What an engine takes to come back with an empty cache."""
DRAINED_US = 60_000_000


class FaultKind(StrEnum):
    """What happens."""

    FAIL = "fail"
    """One engine that decodes dies with everything it holds, and is back after half a minute."""
    DRAIN = "drain"
    """One engine that decodes gets nothing new for a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One of them, `at_us` after the first conversation may arrive."""

    kind: FaultKind
    at_us: int


def plan_faults(fleet: Fleet, faults: tuple[Fault, ...], *, after_us: int) -> None:
    """Let them happen, `after_us` later: each to the next of the engines that decode, the last one first."""
    for number, fault in enumerate(faults):
        engine = fleet.decoders[-1 - number % len(fleet.decoders)]
        start_us = after_us + fault.at_us
        if fault.kind is FaultKind.FAIL:
            fleet.kernel.at(start_us, lambda engine=engine: engine.fail(back_after_us=RESTART_US))  # type: ignore[misc]
            continue
        for at_us, draining in ((start_us, True), (start_us + DRAINED_US, False)):
            fleet.kernel.at(at_us, lambda engine=engine, draining=draining: fleet.drain(engine, draining=draining))  # type: ignore[misc]

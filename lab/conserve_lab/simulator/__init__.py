"""Whole fleets in virtual time, with the production core placing the conversations."""

from __future__ import annotations

from conserve_lab.simulator.compare import Arm, Cell, RunFailed, compare
from conserve_lab.simulator.policies import POLICIES, Dispatch, Policy
from conserve_lab.simulator.run import Outcome, simulate
from conserve_lab.simulator.summary import summarise

__all__ = ["POLICIES", "Arm", "Cell", "Dispatch", "Outcome", "Policy", "RunFailed", "compare", "simulate", "summarise"]

"""Other ways to schedule the same conversations, run through the same SDK, broker and engines."""

from conserve_lab.baselines.per_turn import PerTurnPlanner

__all__ = ["PerTurnPlanner"]

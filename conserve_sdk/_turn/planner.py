"""Which engines a turn uses, given its lease: the seam where experiments put other policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from conserve_sdk.core._quick import quick_init
from conserve_sdk.protocol import Binding, LeaseGrant

__all__ = ["LeasePlanner", "TurnPlan", "TurnPlanner"]


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class TurnPlan:
    """The engines of one turn.

    Attributes:
        prefiller: prefill there first and move the KV; None: the decoder does all.
        decoder: answers.
        hold: ask the decoder to keep the turn's blocks for the next one.
    """

    prefiller: Binding | None
    decoder: Binding
    hold: bool


class TurnPlanner(Protocol):
    """Chooses the engines of a turn. Must be quick and thread-safe."""

    def plan(self, lease: LeaseGrant, *, migration_due: bool) -> TurnPlan:
        """Plan one turn.

        Args:
            lease: the turn's lease.
            migration_due: the lease's single KV transfer is still to be made, by this turn.
        """
        ...


class LeasePlanner:
    """ConServe's rule: the prefiller for the lease's one migration, the pinned decoder for everything."""

    def plan(self, lease: LeaseGrant, *, migration_due: bool) -> TurnPlan:
        """See `TurnPlanner.plan`."""
        return TurnPlan(
            prefiller=lease.prefiller if migration_due else None, decoder=lease.decoder, hold=lease.hold_ms > 0
        )

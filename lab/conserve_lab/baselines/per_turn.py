"""Disaggregated prefill, turn by turn, at its best: what ConServe is compared with.

Every turn is prefilled on a prefiller and its KV moved to a decoder. A strong version of it: the conversation keeps its
decoder and its prefiller, so the prefiller computes only what its own prefix cache lacks and the decoder pulls only
the blocks it has not got. It runs through the SDK's own legs and under the same admission.
"""

from __future__ import annotations

from conserve_sdk._turn import TurnPlan
from conserve_sdk.protocol import LeaseGrant


class PerTurnPlanner:
    """Plans a prefill leg for every turn. Use with the broker's preset `paper`, which gives every lease a prefiller."""

    def plan(self, lease: LeaseGrant, *, migration_due: bool) -> TurnPlan:
        """Return the lease's own engines, whichever turn it is."""
        del migration_due  # due in every turn: that is the policy
        return TurnPlan(prefiller=lease.prefiller, decoder=lease.decoder, hold=lease.hold_ms > 0)

"""Between two turns of a live lease: another lease where the broker asked for it, or where much will be appended."""

from __future__ import annotations

import logging
from typing import Literal

from conserve_sdk._registry import LeaseView
from conserve_sdk._turn.budget import Budget
from conserve_sdk._turn.effects import Flow, supersede
from conserve_sdk._turn.kit import TurnKit
from conserve_sdk._turn.ledger import ActiveTurn
from conserve_sdk.core.units import LeaseId
from conserve_sdk.errors import BrokerError, LeaseError
from conserve_sdk.protocol import LeaseGrant, SupersedeRequest

__all__ = ["Cause", "Moving"]

log = logging.getLogger("conserve_sdk.turn")

ASK_MS_MAX = 1_000
"""Longest that a turn waits for this answer: its lease is live, so the question must not cost more than it may save."""

Cause = Literal["re_lease", "append"]


class Moving:
    """Asks for another lease, at most once per turn. Whatever goes wrong, the turn goes on with the lease it has.

    Args:
        kit: what all turns share.
        turn: the turn.
        budget: its time.
        allowed: False for a request that must not travel with transferred KV: another decoder would compute its whole
            history, or does not know the stored response it continues. A directive waits for a turn that may.
    """

    def __init__(self, kit: TurnKit, *, turn: ActiveTurn, budget: Budget, allowed: bool) -> None:
        self._kit = kit
        self._turn = turn
        self._budget = budget
        self._may_ask = allowed

    def cause(self, view: LeaseView) -> Cause | None:
        """Why this turn should ask before it is sent; None: it need not, or must not.

        Never inside a turn: neither this one, once it was sent, nor another one of the lineage.
        """
        if not self._may_ask or self._kit.skips_broker() or self._kit.is_answering(view.ref):
            return None
        if view.directive:
            return "re_lease"
        threshold_tokens = view.grant.append_threshold_tokens if view.grant is not None else 0
        return "append" if 0 < threshold_tokens < self._append_tokens(view) else None

    def ask(self, view: LeaseView, cause: Cause) -> Flow[LeaseGrant | None]:
        """Ask the broker; None: it gave no lease, and the old one stays."""
        assert view.grant is not None
        self._may_ask = False
        lease = view.grant
        why = view.directive if cause == "re_lease" else f"about {self._append_tokens(view)} new tokens"
        request = SupersedeRequest(
            token=lease.token,
            epoch=lease.epoch,
            reason=why,
            cause=cause,
            cached_tokens=view.held_tokens,
            first_turn_input_bytes=self._turn.digest.text_bytes,
        )
        budget_ms = min(ASK_MS_MAX, int(self._kit.options.timeouts.broker_s * 1000), self._budget.left_ms())
        try:
            trace = self._turn.watch.trace_headers()
            return (yield from supersede(lease.lease_id, request, budget_ms=budget_ms, trace=trace))
        except (BrokerError, LeaseError) as error:
            # A broker that still wants it says so again; one that ended the lease says so to this turn's report.
            log.info("lease_kept lease_id=%s cause=%s error=%s", lease.lease_id, cause, error)
            return None
        finally:
            if cause == "re_lease":
                self._kit.registry.mark_followed(LeaseId(lease.lease_id), now_ms=self._kit.now_ms())

    def _append_tokens(self, view: LeaseView) -> int:
        """New tokens this turn brings, by the ratio of the lineage's newest turn; 0 while there is none."""
        served = view.served
        if served is None or not served.prompt_bytes:
            return 0
        return self._turn.match.append_bytes * served.prompt_tokens // served.prompt_bytes

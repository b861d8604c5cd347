"""Where a turn goes: its lease, the lease it waits for, its conversation's decoder, or a fallback engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from conserve_sdk._registry import FirstTurnClaim, LeaseView
from conserve_sdk._turn.budget import Budget
from conserve_sdk._turn.effects import Flow, acquire, supersede, wait_for
from conserve_sdk._turn.kit import TurnKit
from conserve_sdk._turn.ledger import ActiveTurn
from conserve_sdk._turn.moving import Moving
from conserve_sdk._turn.planner import TurnPlan
from conserve_sdk.core._quick import quick_init
from conserve_sdk.core.units import ConversationId, LeaseId
from conserve_sdk.errors import AccessDenied, BrokerError, LeaseError, LeaseRefused, ProtocolError, RateLimited
from conserve_sdk.protocol import Binding, LeaseGrant, LeaseRequest, SupersedeRequest

__all__ = ["Place", "Placing"]

log = logging.getLogger("conserve_sdk.turn")


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one attempt of a turn goes.

    Attributes:
        lease: None when the turn runs without one.
        claim: the flight this turn leads; it ends when the decoder has answered.
        migration_due: this attempt makes the lease's single KV transfer.
    """

    plan: TurnPlan
    lease: LeaseGrant | None = None
    claim: FirstTurnClaim | None = None
    migration_due: bool = False


class Placing:
    """Finds the place of one turn, and another one when its decoder fails."""

    def __init__(
        self, kit: TurnKit, *, turn: ActiveTurn, budget: Budget, may_move: bool, parent: ConversationId | None = None
    ) -> None:
        self._kit = kit
        self._turn = turn
        self._budget = budget
        self._ref = turn.ref
        self._parent_conversation = parent
        self._leaseless: TurnPlan | None = None
        self._may_ride = True
        self._moving = Moving(kit, turn=turn, budget=budget, allowed=may_move)

    def find(self) -> Flow[Place]:
        """The place of the next attempt; waits for the broker, or for the turn that is asking it already.

        Raises:
            LeaseRefused: not admitted in time.
            BrokerUnavailable: no broker and no fallback.
            httpx2.ReadTimeout: the turn's budget ran out meanwhile.
        """
        started_us = self._kit.clock_us()
        try:
            return (yield from self._find())
        finally:
            self._turn.lease_wait_us += self._kit.clock_us() - started_us

    def settle(self, place: Place) -> None:
        """The attempt is over, well or not: let the turns that waited for it go on."""
        if place.claim is None:
            return
        if place.lease is not None and place.lease.lease_id in self._turn.spent:
            self._kit.registry.mark_migrated(LeaseId(place.lease.lease_id))
        self._kit.registry.settle(place.claim, place.lease)

    def replace(self, place: Place, reason: str) -> Flow[None]:
        """The decoder of `place` failed: get another one for the next attempt.

        Raises:
            LeaseRefused: no other decoder has room.
            BrokerUnavailable: no broker and no fallback.
        """
        if place.lease is None:
            self._may_ride = False
            self._leaseless = None
            return
        lease = place.lease
        request = SupersedeRequest(
            token=lease.token,
            epoch=lease.epoch,
            reason=reason[:500],
            first_turn_input_bytes=self._turn.digest.text_bytes,
            wait_ms=self._wait_ms(),
            failed_engine_id=lease.decoder.engine_id,
        )
        sent_at_ms = self._kit.now_ms()
        try:
            grant = yield from supersede(
                lease.lease_id,
                request,
                budget_ms=self._broker_ms(request.wait_ms),
                gone_ms=self._gone_ms(),
                trace=self._turn.watch.trace_headers(),
            )
        except LeaseError as error:
            # The broker has forgotten the lease meanwhile; the next attempt asks for a new one.
            self._kit.registry.mark_lost(LeaseId(lease.lease_id), type(error).__name__)
        except BrokerError as error:
            if not self._may_do_without(error):
                raise
            self._kit.registry.mark_lost(LeaseId(lease.lease_id), "broker_unavailable")
            self._fall_back()
        else:
            self._store(grant, sent_at_ms=sent_at_ms)

    # ---- the order of choices ---------------------------------------------------------------------------------

    def _find(self) -> Flow[Place]:
        while True:
            if self._leaseless is not None:
                return Place(plan=self._leaseless)
            view = self._kit.registry.view(self._ref, now_ms=self._kit.now_ms())
            if view.live and view.grant is not None and not _migration_due(view) and not self._moving.cause(view):
                return self._on_lease(view.grant)
            host = self._host_of_stranger(view)
            if host is not None:
                return Place(plan=host)
            claim = self._kit.registry.claim(self._ref)
            if not claim.leader:
                yield from self._follow(claim)
                continue
            place = yield from self._lead(claim)
            if place is not None:
                return place

    def _follow(self, claim: FirstTurnClaim) -> Flow[None]:
        """Another turn of this lineage is at its first turn: two prefills of one prompt would be one too many."""
        try:
            yield from wait_for(claim.future, timeout_s=self._budget.left_ms() / 1000)
        except TimeoutError:
            self._budget.left_ms()  # raises the timeout that the application knows

    def _lead(self, claim: FirstTurnClaim) -> Flow[Place | None]:
        try:
            view = self._kit.registry.view(self._ref, now_ms=self._kit.now_ms())
            moves = yield from self._move(view)
            acquires = not (view.live and view.grant is not None)
            if acquires:
                grant = yield from self._acquire(view)
                if grant is None:
                    self._kit.registry.settle(claim, None)
                    return None
            view = self._kit.registry.view(self._ref, now_ms=self._kit.now_ms())
        except BaseException:
            self._kit.registry.settle(claim, None)
            raise
        assert view.grant is not None
        if acquires or (_migration_due(view) and not moves):  # a lease that moves takes its history along
            self._turn.first_turn = not (view.grant.turns or view.grant.migrations)
        if _migration_due(view):
            return self._on_lease(view.grant, claim=claim)
        self._kit.registry.settle(claim, view.grant)
        return self._on_lease(view.grant)

    def _move(self, view: LeaseView) -> Flow[bool]:
        """Ask for another lease in place of the live one, if there is a cause; tells whether it was asked for."""
        cause = self._moving.cause(view) if view.live and not _migration_due(view) else None
        if cause is None:
            return False
        sent_at_ms = self._kit.now_ms()
        grant = yield from self._moving.ask(view, cause)
        if grant is not None:
            self._store(grant, sent_at_ms=sent_at_ms)
        return True

    def _acquire(self, view: LeaseView) -> Flow[LeaseGrant | None]:
        """Ask the broker; None: go on without it, on a fallback engine."""
        if self._kit.skips_broker():
            self._fall_back()
            return None
        wait_ms = self._wait_ms()
        request = LeaseRequest(
            conversation_id=self._ref.conversation_id,
            lineage=self._ref.lineage,
            model=self._ref.model,
            first_turn_input_bytes=self._turn.digest.text_bytes,
            wait_ms=wait_ms,
            hint_engine_id=self._hint(view),
            parent_lease_id=self._parent_lease_id(),
            prefix_key=self._turn.digest.prefix_key,
            client=self._kit.options.client[:200],
        )
        sent_at_ms = self._kit.now_ms()
        try:
            trace = self._turn.watch.trace_headers()
            grant = yield from acquire(
                request, budget_ms=self._broker_ms(wait_ms), gone_ms=self._gone_ms(), trace=trace
            )
        except BrokerError as error:
            if not self._may_do_without(error):
                raise
            self._fall_back()
            return None
        self._store(grant, sent_at_ms=sent_at_ms)
        return grant

    def _store(self, grant: LeaseGrant, *, sent_at_ms: int) -> None:
        self._kit.broker_answered()
        self._kit.registry.store(self._ref, grant, sent_at_ms=sent_at_ms)
        self._kit.reporter.wake()

    # ---- pieces -----------------------------------------------------------------------------------------------

    def _on_lease(self, grant: LeaseGrant, *, claim: FirstTurnClaim | None = None) -> Place:
        plan = self._kit.planner.plan(grant, migration_due=claim is not None)
        return Place(plan=plan, lease=grant, claim=claim, migration_due=claim is not None)

    def _may_do_without(self, error: BrokerError) -> bool:
        """Whether no broker is there, and there is a way without one. A broker that says no is there."""
        if isinstance(error, LeaseRefused):
            log.info("lease_refused conversation_id=%s reason=%s", self._ref.conversation_id, error.reason)
            return False
        if isinstance(error, AccessDenied | RateLimited) or (isinstance(error, ProtocolError) and error.code):
            return False
        if isinstance(error, ProtocolError):  # a proxy's page, another server, another version: worth somebody's look
            log.warning("broker_not_understood: %s", error)
        self._kit.broker_failed()
        return self._kit.can_fall_back()

    def _fall_back(self) -> None:
        self._turn.lost("broker_unavailable")
        engine = self._kit.fallback_engine(self._ref.conversation_id, attempt=self._turn.failovers)
        self._leaseless = _leaseless(engine)

    def _host_of_stranger(self, view: LeaseView) -> TurnPlan | None:
        """The decoder on which a tiny request of the same conversation rides, if this is one.

        Titles, summaries and guardrails add nothing to what was said: a lease of their own would outlive them. That
        goes for the same words said again, too, but not for a rewritten history, which goes on.
        """
        match = self._turn.match
        grows = match.extends and match.uncached_bytes > 0
        small = self._turn.digest.text_bytes <= self._kit.options.stranger_bytes_max
        if grows or match.replaces or view.grant is not None or not small or not self._may_ride:
            return None
        others = self._kit.registry.views(self._ref.conversation_id, now_ms=self._kit.now_ms())
        hosts = [other for other in others if other.live and other.ref.model == self._ref.model]
        hosts.sort(key=lambda other: other.ref.lineage != match.parent)  # the parent first
        grant = hosts[0].grant if hosts else None
        return _leaseless(grant.decoder) if grant else None

    def _hint(self, view: LeaseView) -> str | None:
        """The decoder that may still hold a prefix: the lineage's last one, else its parent's."""
        if view.grant is not None:
            return None if view.lost == "engine_lost" else view.grant.decoder.engine_id
        parent = self._parent()
        return parent.decoder.engine_id if parent is not None else None

    def _parent_lease_id(self) -> str | None:
        """The lease of the lineage that this one branched off: what the broker may keep together."""
        parent = self._parent()
        return parent.lease_id if parent is not None else None

    def _parent(self) -> LeaseGrant | None:
        lineage = self._turn.match.parent
        if lineage is None:
            return self._lease_of_parent_conversation()
        view = self._kit.registry.view(self._ref._replace(lineage=lineage), now_ms=self._kit.now_ms())
        return view.grant if view.live else None

    def _lease_of_parent_conversation(self) -> LeaseGrant | None:
        """The oldest live lease of the conversation that the application names as the parent of this one."""
        if self._parent_conversation is None:
            return None
        views = self._kit.registry.views(self._parent_conversation, now_ms=self._kit.now_ms())
        return next((view.grant for view in views if view.live and view.ref.model == self._ref.model), None)

    def _wait_ms(self) -> int:
        """What is left of the time for admission, counted from the turn's arrival."""
        left = min(self._kit.options.wait_ms - self._budget.elapsed_ms(), self._budget.left_ms())
        return max(left, 0)

    def _broker_ms(self, wait_ms: int) -> int:
        return min(wait_ms + int(self._kit.options.timeouts.broker_s * 1000), self._budget.left_ms())

    def _gone_ms(self) -> int | None:
        """A broker that restarts is worth waiting for; with another way to an answer, not for long."""
        return int(self._kit.options.timeouts.broker_gone_s * 1000) if self._kit.can_fall_back() else None


def _migration_due(view: LeaseView) -> bool:
    return view.grant is not None and view.grant.mode == "migrate" and not view.migrated


def _leaseless(engine: Binding) -> TurnPlan:
    """All on one engine, without a lease."""
    return TurnPlan(prefiller=None, decoder=engine, hold=False)

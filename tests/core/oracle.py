"""A second, independent account of what a broker must do: fed with every event and decision, it checks the invariants.

It places nothing itself. It knows when leases end, which engines may get leases, who waits, and what the journal
holds; whatever the broker decides is checked against that. Numbers are those of the design's section 10.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from conserve_sdk.core import (
    Activity,
    Broker,
    Decision,
    Directive,
    DropReason,
    EngineId,
    EngineObserved,
    EngineRemoved,
    EngineRestarted,
    EngineState,
    Event,
    Granted,
    Lease,
    LeaseAnswered,
    LeaseDropped,
    LeaseId,
    LeaseParked,
    LeaseReadopted,
    LeaseReleased,
    LeaseRenewed,
    LeaseRequested,
    LeaseStored,
    LeaseVerdict,
    Mode,
    MoveReason,
    Ms,
    PrefillerHosts,
    Recovered,
    Refused,
    RequestCancelled,
    RequestId,
    Role,
    SupersedeCause,
    SupersedeRequested,
    TenantId,
    TurnFinished,
    TurnStarted,
    Waiting,
)
from tests.core.oracle_books import Asked, Books

Touched = LeaseRenewed | TurnStarted | TurnFinished


@dataclass
class Oracle(Books):
    """`follow` checks each decision, `check` compares the books with the broker's."""

    # ---- following ----

    def follow(self, event: Event, decisions: list[Decision]) -> None:
        """Take one event and what the broker decided."""
        self.now_ms = event.now_ms
        if isinstance(event, LeaseRequested | SupersedeRequested):
            self.pending[event.request_id] = event
        if isinstance(event, RequestCancelled):
            due = self.pending.get(event.request_id)
            if due is not None and self.deadline_ms(due) > self.now_ms:
                del self.pending[event.request_id]
        self._follow_engine(event)
        if isinstance(event, EngineRestarted):
            self._follow_restart(event)
        if isinstance(event, LeaseReadopted):
            self._follow_readoption(event, decisions)  # whoever waits for its key is answered with it at once
        for decision in decisions:
            self._follow_decision(event, decision)
        self._follow_touch(event, decisions)

    def _follow_readoption(self, event: LeaseReadopted, decisions: list[Decision]) -> None:
        lease_id = event.lease.lease_id
        verdicts = [each.verdict for each in decisions if isinstance(each, LeaseAnswered) and each.lease_id == lease_id]
        if LeaseVerdict.OK in verdicts and lease_id not in self.ends:
            assert lease_id not in self.ended or self._forgotten(lease_id), "what ended is not re-adopted"
            assert event.lease.expires_at_ms > self.now_ms, "4: no resurrection"
            self.ends[lease_id] = max(event.lease.expires_at_ms, self.grace_until_ms)
            if event.lease.migrations and lease_id not in self.moved:
                self.counted_before.add(lease_id)

    def _follow_decision(self, event: Event, decision: Decision) -> None:
        match decision:
            case LeaseStored(lease=lease, fresh=fresh):
                assert fresh is (lease.lease_id not in self.rows), "its receipt is written once"
                self.rows[lease.lease_id] = lease
            case LeaseDropped(lease=lease, reason=reason):
                self._check_drop(event, lease, reason)
                self.rows_before[lease.lease_id] = self.rows[lease.lease_id]
                del self.rows[lease.lease_id]
                self.ends.pop(lease.lease_id)
                self.ended[lease.lease_id] = (reason, self.now_ms)
            case Granted(request_id=request_id, lease=lease, reused=reused):
                asked = self._answer(request_id)
                assert lease.key == asked.key
                if reused:
                    assert lease.lease_id in self.ends, "5: the same key gets its live lease"
                    self._live_on(lease.lease_id)
                else:
                    self._check_grant(asked, lease)
            case Refused(request_id=request_id):
                self._answer(request_id)
            case Waiting(request_id=request_id):
                assert request_id in self.pending

    def _follow_move(self, event: Event) -> None:
        if not isinstance(event, TurnFinished) or not event.migrated:
            return
        lease_id = event.lease_id
        ended = lease_id in self.ended
        if lease_id in self.counted_before or self.first[lease_id].mode is not Mode.MIGRATE:
            return
        if lease_id in self.ends or ended:
            (self.perhaps_moved if ended and self._forgotten(lease_id) else self.moved).add(lease_id)

    def _follow_touch(self, event: Event, decisions: list[Decision]) -> None:
        self._check_directives(decisions)
        self._follow_move(event)
        said = [decision for decision in decisions if isinstance(decision, LeaseAnswered)]
        if not isinstance(event, Touched | LeaseParked | LeaseReleased | LeaseReadopted):
            assert said == []
            return
        lease_id = event.lease.lease_id if isinstance(event, LeaseReadopted) else event.lease_id
        (one,) = said
        assert one.lease_id == lease_id
        ok = one.verdict is LeaseVerdict.OK
        assert (one.lease is not None) is ok
        if isinstance(event, LeaseReadopted):
            assert not ok or lease_id in self.ends
            return
        if isinstance(event, LeaseReleased):
            assert lease_id not in self.ends
            return
        assert ok is (lease_id in self.ends), "4: OK exactly while it lives"
        if not ok:
            self._check_verdict(lease_id, one.verdict)
        elif isinstance(event, LeaseParked):
            self.ends[lease_id] = min(self.ends[lease_id], self._span(self.settings.park_ttl_ms))
        elif not (isinstance(event, LeaseRenewed) and one.lease and one.lease.activity is Activity.PARKED):
            self._live_on(lease_id)

    def _check_directives(self, decisions: list[Decision]) -> None:
        """Said of live leases only, never of parked ones, and only where the preset re-leases."""
        for one in decisions:
            if isinstance(one, LeaseAnswered):
                assert (one.directive is Directive.RE_LEASE) is (one.move_reason is not None)
            if isinstance(one, LeaseAnswered) and one.move_reason is not None:
                assert self.settings.placement.re_lease
                assert one.lease is not None
                assert one.lease.activity is not Activity.PARKED
                facts = self.engines[one.lease.decoder.engine_id]
                assert facts.draining is (one.move_reason is MoveReason.DRAINING)

    def restart(self, event: Recovered, decisions: list[Decision]) -> None:
        """The broker starts again from the journal: waiting clients and tombstones are lost, engines unknown."""
        self.now_ms = event.now_ms
        self.grace_until_ms = event.now_ms + event.grace_ms
        self.pending.clear()
        self.ended.clear()
        self.engines.clear()
        self.moved.clear()
        self.perhaps_moved.clear()
        self.counted_before = {lease_id for lease_id, lease in self.rows.items() if lease.migrations}
        self.ends = {lease_id: max(lease.expires_at_ms, self.grace_until_ms) for lease_id, lease in self.rows.items()}
        for decision in decisions:
            self._follow_decision(event, decision)

    # ---- what must hold of each decision ----

    def _check_grant(self, asked: Asked, lease: Lease) -> None:
        assert lease.lease_id not in self.first, "ids are new"
        self.first[lease.lease_id] = lease
        self.ends[lease.lease_id] = self._span(self.settings.ttl_ms)
        assert self.ready(lease.decoder.engine_id), "6: draining, stale or restarted engines get no new lease"
        bound = [lease.decoder] if lease.prefiller is None else [lease.decoder, lease.prefiller]
        moved_from = self._check_move(asked, lease)
        for binding in bound:
            facts = self.engines[binding.engine_id]
            assert binding.engine_id == moved_from or self.ready(binding.engine_id), "6"
            assert facts.seen is not None
            assert (binding.incarnation, binding.url) == (facts.seen.incarnation, facts.spec.url)
            if isinstance(asked, SupersedeRequested):
                assert binding.engine_id != asked.failed_engine_id
        assert (lease.prefiller is None) is (lease.mode is Mode.LOCAL)
        if self.engines[lease.decoder.engine_id].spec.role is Role.PREFILLER:
            assert self.settings.placement.prefiller_hosts is PrefillerHosts.AUTO
            assert (lease.prefiller, lease.hold_ms, lease.append_threshold_tokens) == (None, 0, 0)
        if isinstance(asked, SupersedeRequested):
            assert (lease.epoch, lease.supersedes) == (asked.epoch + 1, asked.lease_id)
        else:
            assert (lease.epoch, lease.supersedes) == (1, None)

    def _check_move(self, asked: Asked, lease: Lease) -> EngineId | None:
        """The old decoder that hands its KV on, where this lease is a move."""
        if not isinstance(asked, SupersedeRequested) or asked.cause is SupersedeCause.FAILURE:
            return None
        old = self.first[asked.lease_id]
        if self.ended.get(asked.lease_id) != (DropReason.SUPERSEDED, self.now_ms):
            return None  # the lease was gone before: an ordinary grant
        if asked.cause is SupersedeCause.APPEND:
            assert lease.decoder == old.decoder, "an append leaves the conversation where it is"
            assert lease.prefiller is not None
            return None
        assert self.settings.placement.re_lease
        assert lease.decoder.engine_id != old.decoder.engine_id, "a re-lease goes elsewhere"
        assert lease.prefiller in {None, old.decoder}, "the KV moves from the old decoder or not at all"
        if not self.engines[old.decoder.engine_id].draining:
            state = self.rows_before[asked.lease_id]
            assert state.activity is Activity.IDLE
            assert self.now_ms - state.activity_since_ms > self.settings.placement.move_idle_ms
        return old.decoder.engine_id

    def _check_drop(self, event: Event, lease: Lease, reason: DropReason) -> None:
        lease_id, facts = lease.lease_id, self.engines.get(lease.decoder.engine_id)
        assert lease_id in self.ends
        match reason:
            case DropReason.EXPIRED:
                assert self.ends[lease_id] <= self.now_ms, "4: never expired before its TTL"
                assert self.now_ms >= self.grace_until_ms, "7: nothing expires inside the grace"
            case DropReason.RELEASED:
                assert isinstance(event, LeaseReleased)
                assert event.lease_id == lease_id
            case DropReason.SUPERSEDED:
                assert self.ends[lease_id] > self.now_ms
                assert self._may_supersede(event, lease), "compare-and-set on id and epoch"
            case DropReason.ENGINE_RESTARTED:
                assert facts is not None
                assert isinstance(event, EngineObserved | EngineRestarted)
                assert event.incarnation != lease.decoder.incarnation
            case DropReason.ENGINE_GONE:
                assert facts is not None
                assert self.gone(facts)
            case DropReason.ENGINE_REMOVED:
                assert isinstance(event, EngineRemoved)
                assert event.engine_id == lease.decoder.engine_id

    def _may_supersede(self, event: Event, lease: Lease) -> bool:
        if isinstance(event, LeaseReadopted):
            return event.lease.key == lease.key and event.lease.epoch > lease.epoch
        return any(
            isinstance(asked, SupersedeRequested) and (asked.lease_id, asked.epoch) == (lease.lease_id, lease.epoch)
            for asked in self.pending.values()
        )

    def _check_verdict(self, lease_id: LeaseId, verdict: LeaseVerdict) -> None:
        if lease_id not in self.ended or self._forgotten(lease_id):
            return
        reason = self.ended[lease_id][0]
        if reason in {DropReason.EXPIRED, DropReason.RELEASED}:
            assert verdict is LeaseVerdict.UNKNOWN
        elif reason is DropReason.SUPERSEDED:
            assert verdict is LeaseVerdict.SUPERSEDED
        else:
            assert verdict is LeaseVerdict.ENGINE_LOST

    def _forgotten(self, lease_id: LeaseId) -> bool:
        """Whether the broker may have forgotten this end: bounded in number and in time."""
        younger = list(self.ended)[list(self.ended).index(lease_id) :]
        old = self.now_ms >= self.ended[lease_id][1] + 2 * self.settings.ttl_ms
        return old or len(younger) > self.settings.leases_max

    def _answer(self, request_id: RequestId) -> Asked:
        assert request_id not in self.answered, "answered once"
        self.answered.add(request_id)
        return self.pending.pop(request_id)

    # ---- what must hold always ----

    def check(self, broker: Broker) -> None:
        """Compare the books."""
        live = {lease.lease_id: lease for lease in broker.leases()}
        assert {lease_id: lease.expires_at_ms for lease_id, lease in live.items()} == self.ends, "4"
        assert all(at_ms > self.now_ms for at_ms in self.ends.values()), "4"
        assert len({lease.key for lease in live.values()}) == len(live) == broker.lease_count(), "5"
        for lease in live.values():
            self._check_live(broker, lease)
        self._check_ledger(broker, live)
        forever = {
            lease_id: replace(lease, expires_at_ms=Ms(self.ends[lease_id])) for lease_id, lease in self.rows.items()
        }
        assert forever == live, "8: the journal is the live state"
        assert broker.lease_count() <= self.settings.leases_max, "9"
        assert broker.waiting() == len(self.pending) <= self.settings.queue_max, "9"
        assert broker.next_deadline_ms() == self.next_deadline_ms()
        counted = broker.counters.migrations
        assert len(self.moved) <= counted <= len(self.moved | self.perhaps_moved), "2: each transfer counts, once"
        self._check_nobody_waits_in_vain(broker)

    def _check_live(self, broker: Broker, lease: Lease) -> None:
        origin = self.first[lease.lease_id]
        same = ("key", "epoch", "mode", "prefiller", "decoder", "granted_at_ms", "ttl_ms", "supersedes", "receipt")
        for name in same:
            assert getattr(lease, name) == getattr(origin, name), "1: a lease's engines never change"
        assert lease.migrations <= (1 if lease.mode is Mode.MIGRATE else 0), "2"
        assert broker.live_lease_of(lease.key) == broker.lease(lease.lease_id) == lease
        facts = self.engines.get(lease.decoder.engine_id)
        if facts is not None and facts.seen is not None:
            assert facts.seen.incarnation == lease.decoder.incarnation, "leases of a restarted decoder are dropped"
        assert facts is None or not self.gone(facts), "leases of a gone decoder are dropped"

    def _check_ledger(self, broker: Broker, live: dict[LeaseId, Lease]) -> None:
        for view in broker.engines():
            here = [lease for lease in live.values() if lease.decoder.engine_id == view.engine_id]
            assert view.kv_leased_tokens == sum(lease.ledger_tokens for lease in here), "3"
            holding = [lease for lease in here if lease.hold_ms and lease.activity is not Activity.PARKED]
            assert view.kv_holding_tokens == sum(lease.ledger_tokens for lease in holding), "3"
            warm = [lease for lease in here if not view.spec.host_tier_tokens or not self.cold(lease)]
            assert view.kv_active_tokens == sum(lease.ledger_tokens for lease in warm), "3: exactly TAU"
            assert view.lost_caches >= 0
            assert 0 <= view.prefill_share_ppm <= 1_000_000
            assert (view.leases, view.busy) == (len(here), sum(each.activity is Activity.BUSY for each in here)), "3"
            assert view.backlog_tokens >= 0
            assert live or view.backlog_tokens == 0
            if view.state is EngineState.READY:
                assert self.ready(view.engine_id, stale_too=True)
            facts = self.engines[view.engine_id]
            assert (view.state is EngineState.GONE) is self.gone(facts)

    def _check_nobody_waits_in_vain(self, broker: Broker) -> None:
        heads: dict[tuple[TenantId, str], Asked] = {}
        for asked in self.pending.values():
            assert self.deadline_ms(asked) > self.now_ms, "refused exactly at its deadline"
            heads.setdefault((asked.key.tenant, asked.key.model), asked)
        views = {view.engine_id: view for view in broker.engines()}
        for asked in heads.values():
            if self._over_quota(broker, asked):
                continue
            for engine_id in self.engines:
                view = views[engine_id]
                if not self.ready(engine_id):
                    continue
                if isinstance(asked, SupersedeRequested) and asked.failed_engine_id == engine_id:
                    continue
                assert not self.fits(view, asked.first_turn_input_tokens), f"{asked} fits on {engine_id}"

    def _over_quota(self, broker: Broker, asked: Asked) -> bool:
        quota = self.settings.leased_tokens_per_tenant_max
        live = broker.live_lease_of(asked.key)  # what it replaces does not count
        held = sum(
            lease.ledger_tokens for lease in broker.leases() if lease.key.tenant == asked.key.tenant and lease != live
        )
        return 0 < quota < held + asked.first_turn_input_tokens

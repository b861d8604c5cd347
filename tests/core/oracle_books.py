"""What the oracle knows: its books of leases, requests and engines, and what follows from them at this instant."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from conserve_sdk.core import (
    Activity,
    BrokerSettings,
    DropReason,
    EngineConfigured,
    EngineDrained,
    EngineFailureReported,
    EngineId,
    EngineObserved,
    EngineRemoved,
    EngineRestarted,
    EngineSpec,
    EngineUnreachable,
    EngineView,
    Event,
    Lease,
    LeaseId,
    LeaseKey,
    LeaseRequested,
    PrefillerHosts,
    RequestId,
    Role,
    SupersedeRequested,
)

Asked = LeaseRequested | SupersedeRequested
"""What waits to be answered."""


@dataclass
class EngineFacts:
    """What was told about one engine."""

    spec: EngineSpec
    since_ms: int
    draining: bool = False
    seen: EngineObserved | None = None
    failing: bool = False
    blamed_at_ms: int | None = None


@dataclass
class Books:
    """What was told and what was decided, kept apart from the broker's own."""

    settings: BrokerSettings
    now_ms: int = 0
    grace_until_ms: int = 0
    engines: dict[EngineId, EngineFacts] = field(default_factory=dict)
    first: dict[LeaseId, Lease] = field(default_factory=dict)
    """Every lease ever granted, as it was granted."""
    rows: dict[LeaseId, Lease] = field(default_factory=dict)
    """The journal."""
    rows_before: dict[LeaseId, Lease] = field(default_factory=dict)
    """Rows as they were when they were dropped."""
    ends: dict[LeaseId, int] = field(default_factory=dict)
    """When each live lease dies."""
    ended: dict[LeaseId, tuple[DropReason, int]] = field(default_factory=dict)
    pending: dict[RequestId, Asked] = field(default_factory=dict)
    answered: set[RequestId] = field(default_factory=set)
    moved: set[LeaseId] = field(default_factory=set)
    """Leases whose transfer this broker was told of, while it knew them or their tombstone."""
    perhaps_moved: set[LeaseId] = field(default_factory=set)
    """The same, of leases that it may have forgotten."""
    counted_before: set[LeaseId] = field(default_factory=set)
    """Leases whose transfer the broker counted that wrote their row or token."""

    # ---- engines ----

    def _follow_restart(self, event: EngineRestarted) -> None:
        facts = self.engines.get(event.engine_id)
        if facts is not None and facts.seen is not None and facts.seen.incarnation == event.before:
            self.engines[event.engine_id] = EngineFacts(facts.spec, event.now_ms, facts.draining)

    def _follow_engine(self, event: Event) -> None:
        match event:
            case EngineConfigured(spec=spec):
                known = self.engines.setdefault(spec.engine_id, EngineFacts(spec, event.now_ms))
                known.draining = known.draining or event.draining
            case EngineRemoved(engine_id=engine_id):
                self.engines.pop(engine_id, None)
            case EngineObserved(engine_id=engine_id) if engine_id in self.engines:
                facts = self.engines[engine_id]
                again = facts.seen is not None and facts.seen.incarnation == event.incarnation
                if facts.blamed_at_ms is not None and (not again or event.now_ms > facts.blamed_at_ms):
                    facts.blamed_at_ms = None
                facts.seen, facts.failing = event, False
            case EngineUnreachable(engine_id=engine_id) if engine_id in self.engines:
                self.engines[engine_id].failing = True
            case EngineDrained(engine_id=engine_id) if engine_id in self.engines:
                self.engines[engine_id].draining = event.draining
            case EngineFailureReported(engine_id=engine_id) if engine_id in self.engines:
                facts = self.engines[engine_id]
                if facts.seen is not None and facts.seen.incarnation == event.incarnation:
                    facts.blamed_at_ms = event.now_ms

    # ---- own knowledge ----

    def ready(self, engine_id: EngineId, *, stale_too: bool = False) -> bool:
        """Whether this engine may get leases now."""
        facts = self.engines.get(engine_id)
        if facts is None or facts.seen is None or facts.draining or facts.blamed_at_ms is not None:
            return False
        age_ms = self.now_ms - facts.seen.now_ms
        suspect = facts.failing and age_ms >= self.settings.suspect_after_ms
        return not suspect and (stale_too or age_ms <= self.settings.observation_max_age_ms)

    def cold(self, lease: Lease) -> bool:
        """Whether a lease does not count as active on a decoder with a host tier."""
        rules = self.settings.placement
        if not rules.idle_aware or lease.activity is Activity.BUSY:
            return False
        if lease.activity is Activity.PARKED:
            return True
        return self.now_ms - lease.activity_since_ms >= rules.idle_after_ms

    def fits(self, view: EngineView, need: int) -> bool:
        """The rule of docs/placement.md, in fractions."""
        rules, capacity = self.settings.placement, view.kv_capacity_tokens
        over = Fraction(rules.kv_watermark_ppm, 1_000_000)
        leased = max(view.kv_leased_tokens, view.kv_used_tokens) + need
        active = max(view.kv_active_tokens, view.kv_used_tokens) + need
        if view.spec.role is Role.PREFILLER:
            over = max(over - Fraction(rules.host_reserve_ppm, 1_000_000), Fraction(0))
            active = max(view.kv_active_tokens + view.backlog_tokens, view.kv_used_tokens) + need
            free = Fraction(view.prefill_share_ppm, 1_000_000) <= Fraction(rules.host_gate_ppm, 1_000_000)
            if rules.prefiller_hosts is not PrefillerHosts.AUTO or not free or active > over * capacity:
                return False
        if not (view.spec.host_tier_tokens and rules.idle_aware):
            return leased <= over * capacity
        hover = Fraction(rules.oversubscription_ppm, 1_000_000)
        bound = min(hover * capacity, capacity + view.spec.host_tier_tokens)
        return active <= over * capacity and leased <= bound

    def gone(self, facts: EngineFacts) -> bool:
        """Whether the engine has failed for too long."""
        return facts.failing and self.now_ms >= self._gone_at_ms(facts)

    def _gone_at_ms(self, facts: EngineFacts) -> int:
        since_ms = facts.since_ms if facts.seen is None else facts.seen.now_ms
        gone_at_ms = since_ms + self.settings.gone_after_ms
        return max(gone_at_ms, self.grace_until_ms) if facts.seen is None else gone_at_ms

    def deadline_ms(self, asked: Asked) -> int:
        """When the broker must have refused this request."""
        return min(asked.deadline_at_ms, asked.now_ms + self.settings.wait_max_ms)

    def next_deadline_ms(self) -> int | None:
        """When something happens by itself."""
        deadlines = [*self.ends.values(), *(self.deadline_ms(asked) for asked in self.pending.values())]
        if self.pending and self.settings.placement.idle_aware:
            idle = [lease for lease in self.rows.values() if lease.activity is Activity.IDLE]
            deadlines += [lease.activity_since_ms + self.settings.placement.idle_after_ms for lease in idle]
        for facts in self.engines.values():
            if facts.failing:
                deadlines.append(self._gone_at_ms(facts))
                if facts.seen is not None and facts.blamed_at_ms is None:
                    deadlines.append(facts.seen.now_ms + self.settings.suspect_after_ms)
        return min((at_ms for at_ms in deadlines if at_ms > self.now_ms), default=None)

    def key_of(self, lease_id: LeaseId) -> LeaseKey:
        """Whose lease it was."""
        return self.first[lease_id].key

    def _span(self, span_ms: int) -> int:
        return max(self.now_ms + span_ms, self.grace_until_ms)

    def _live_on(self, lease_id: LeaseId) -> None:
        self.ends[lease_id] = max(self.ends[lease_id], self._span(self.settings.ttl_ms))

"""The broker's state, and the few ways in which a lease enters, changes and leaves it.

Every change of a lease goes through `State`, so that table, ledger, backlog, tombstones, counters and the shell's
journal can never disagree.
"""

from __future__ import annotations

from conserve_sdk.core.admission import AdmissionQueue
from conserve_sdk.core.decisions import Decision, EngineStateChanged, LeaseAnswered, LeaseDropped, LeaseStored
from conserve_sdk.core.estimates import TokensPerByte
from conserve_sdk.core.figures import Figures
from conserve_sdk.core.fleet import Fleet
from conserve_sdk.core.idleness import Idleness
from conserve_sdk.core.lease import Activity, Lease, LeaseKey
from conserve_sdk.core.lease_table import LeaseTable, Tombstones
from conserve_sdk.core.occupancy import Occupancy
from conserve_sdk.core.prefixes import SharedPrefixes
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import EngineId, LeaseId, Ms, Tokens
from conserve_sdk.core.views import BrokerCounters
from conserve_sdk.core.vocabulary import Directive, DropReason, LeaseVerdict, MoveReason

_VERDICTS = {
    DropReason.RELEASED: LeaseVerdict.UNKNOWN,
    DropReason.EXPIRED: LeaseVerdict.UNKNOWN,
    DropReason.SUPERSEDED: LeaseVerdict.SUPERSEDED,
    DropReason.ENGINE_RESTARTED: LeaseVerdict.ENGINE_LOST,
    DropReason.ENGINE_GONE: LeaseVerdict.ENGINE_LOST,
    DropReason.ENGINE_REMOVED: LeaseVerdict.ENGINE_LOST,
}


class State:
    """What `Broker` holds between two events.

    Attributes:
        now_ms: instant of the event in hand.
        grace_until_ms: nothing expires before it.
        out: decisions of the event in hand, in order.
        rivals: leases that a standby saw beside another one of the same key with at least their epoch.
        contexts: KV that the last turn of a live lease left on its decoder; only known ones.
        directives: leases that were told to move and have not yet.
        activities: how many live leases are busy, idle and parked.
        room_may_have_appeared: whether waiting requests deserve another try.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self.settings = settings
        self.now_ms = Ms(0)
        self.grace_until_ms = Ms(0)
        self.out: list[Decision] = []
        self.room_may_have_appeared = False
        self.counters = BrokerCounters()
        self.leases = LeaseTable()
        self.tombstones = Tombstones(entries_max=max(settings.leases_max, 1))
        self.occupancy = Occupancy()
        self.fleet = Fleet(settings, self.occupancy)
        self.queue = AdmissionQueue()
        self.ratios = TokensPerByte()
        self.prefixes = SharedPrefixes()
        self.figures = Figures()
        self.idleness = Idleness(idle_after_ms=settings.placement.idle_after_ms)
        self.rivals: dict[LeaseId, Lease] = {}
        self.contexts: dict[LeaseId, Tokens] = {}
        self.directives: dict[LeaseId, MoveReason] = {}
        self.activities = dict.fromkeys(Activity, 0)

    # ---- leases ----

    def expiry_ms(self, span_ms: Ms) -> Ms:
        """The instant this far from now, or the end of the grace if that is later (invariant 7)."""
        return Ms(max(self.now_ms + span_ms, self.grace_until_ms))

    def spare_until(self, at_ms: Ms) -> None:
        """Nothing expires before this instant (invariant 7)."""
        self.grace_until_ms = at_ms
        self.leases.spare_until(at_ms)
        self.fleet.spare_unobserved_until(at_ms)

    def enter(self, lease: Lease) -> None:
        """A lease goes live: granted, re-adopted or recovered."""
        self.leases.add(lease)
        self._count(lease)
        self.fleet.touch(lease.decoder.engine_id)

    def store(self, lease: Lease, *, fresh: bool = False) -> None:
        """Have the shell write the lease's row."""
        self.out.append(LeaseStored(lease=lease, fresh=fresh))

    def extended_ms(self, lease: Lease) -> Ms:
        """The end of a lease that is renewed now: a full TTL from now, never sooner than it was."""
        return max(self.expiry_ms(lease.ttl_ms), lease.expires_at_ms)

    def leave(self, lease_id: LeaseId) -> Lease:
        """A lease is not live any more; why, and who hears of it, is the caller's. Returned as it was put in."""
        lease = self.leases.remove(lease_id)
        self._uncount(lease)
        self.fleet.touch(lease.decoder.engine_id)
        return lease

    def update(self, before: Lease, after: Lease) -> None:
        """A live lease changed in more than its expiry."""
        self.leases.replace(after)
        self._uncount(before)
        self._count(after)
        self.fleet.touch(after.decoder.engine_id)
        self.store(after)
        if after.ledger_tokens < before.ledger_tokens or self.idleness.is_cold(after.lease_id):
            self.room_may_have_appeared = True

    def extend(self, lease: Lease) -> Lease:
        """Renew: the lease lives a full TTL from now; never shorter than it did. Not journaled, grace covers it."""
        expires_at_ms = self.extended_ms(lease)
        return lease if expires_at_ms == lease.expires_at_ms else self.leases.prolong(lease, expires_at_ms)

    def drop(self, lease: Lease, reason: DropReason) -> None:
        """A lease ends, for whatever reason."""
        self.leave(lease.lease_id)
        self.contexts.pop(lease.lease_id, None)
        self.directives.pop(lease.lease_id, None)
        self.prefixes.forget(lease.lease_id)
        self.fleet.finish_prefill(lease)
        # A token stays valid for up to two TTLs after it was signed; parking shortens the lease, not its tokens.
        keep_until_ms = Ms(max(lease.expires_at_ms, self.now_ms) + 2 * lease.ttl_ms)
        self.tombstones.bury(lease, reason, keep_until_ms=keep_until_ms)
        self.out.append(LeaseDropped(lease=lease, reason=reason))
        self.room_may_have_appeared = True
        match reason:
            case DropReason.RELEASED:
                self.counters.released += 1
            case DropReason.EXPIRED:
                self.counters.expired += 1
            case DropReason.SUPERSEDED:
                self.counters.superseded += 1

    def drop_all_on(self, engine_id: EngineId, reason: DropReason) -> None:
        """A decoder and with it the KV of all its leases is lost."""
        for lease in self.leases.of_decoder(engine_id):
            self.drop(lease, reason)

    def next_cooling_ms(self) -> Ms | None:
        """When the next idle lease stops counting as active; asked for only while somebody waits for room."""
        return self.idleness.next_ms() if len(self.queue) else None

    def cool(self) -> None:
        """Idle leases whose time has come no longer count as active on decoders with a host tier."""
        while (lease_id := self.idleness.first_due(self.now_ms)) is not None:
            lease = self.leases.get(lease_id)
            assert lease is not None, f"idle lease {lease_id} is not live"
            self.occupancy.cool(lease, sign=1)
            self.fleet.touch(lease.decoder.engine_id)
            self.room_may_have_appeared = True

    def _count(self, lease: Lease) -> None:
        self.occupancy.add(lease)
        self.activities[lease.activity] += 1
        if self.settings.placement.idle_aware and self.idleness.follow(lease, now_ms=self.now_ms):
            self.occupancy.cool(lease, sign=1)

    def _uncount(self, lease: Lease) -> None:
        if self.idleness.forget(lease.lease_id):
            self.occupancy.cool(lease, sign=-1)
        self.occupancy.remove(lease)
        self.activities[lease.activity] -= 1

    # ---- answers ----

    def answer_ok(self, lease: Lease, move: MoveReason | None = None) -> None:
        """Say yes; see `yes`."""
        self.out.append(yes(lease, move))

    def no(self, lease_id: LeaseId) -> LeaseAnswered:
        """The answer that a lease is not live, and what became of it."""
        ended = self.tombstones.get(lease_id)
        if ended is None:
            return LeaseAnswered(lease_id=lease_id, verdict=LeaseVerdict.UNKNOWN)
        if ended[0] is DropReason.SUPERSEDED:
            return self.superseded(lease_id, ended[1])
        return LeaseAnswered(lease_id=lease_id, verdict=_VERDICTS[ended[0]])

    def superseded(self, lease_id: LeaseId, key: LeaseKey) -> LeaseAnswered:
        """The answer that another lease of the key took over, and which, if it still lives."""
        live = self.leases.live_of(key)
        return LeaseAnswered(
            lease_id=lease_id,
            verdict=LeaseVerdict.SUPERSEDED,
            successor=None if live is None else live.lease_id,
        )

    def tell(self, changed: EngineStateChanged | None) -> None:
        """Pass on a change of an engine's state."""
        if changed is not None:
            self.out.append(changed)


def yes(lease: Lease, move: MoveReason | None = None) -> LeaseAnswered:
    """The answer that a lease lives, as it is now, and whether it should move before its next turn."""
    return LeaseAnswered(
        lease_id=lease.lease_id,
        verdict=LeaseVerdict.OK,
        lease=lease,
        directive=Directive.NONE if move is None else Directive.RE_LEASE,
        move_reason=move,
    )

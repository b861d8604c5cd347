"""The live leases: by id, by key, by decoder and by expiry; and tombstones of those that ended.

A lease lives while ``now_ms < expires_at_ms``; at that instant it is dead, and no renewal brings it back. Expiry
uses a lazy heap: a renewal only replaces the lease, its old entry is moved on when it comes up. The grace after a
restart is one number for all leases: it is added when they are read, so that a broker with 100 000 of them need not
touch each before its first grant.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from conserve_sdk.core.lease import Lease, LeaseKey, Mode
from conserve_sdk.core.units import EngineId, Incarnation, LeaseId, Ms, TenantId
from conserve_sdk.core.vocabulary import DropReason


class LeaseTable:
    """At most one live lease per key (invariant 5).

    Attributes:
        removals: how many leases have left it; with the order of the table enough to find one's place in it again.
    """

    def __init__(self) -> None:
        self.removals = 0
        self._by_id: dict[LeaseId, Lease] = {}
        self._by_key: dict[LeaseKey, LeaseId] = {}
        self._by_decoder: dict[EngineId, dict[LeaseId, None]] = {}
        self._of_tenant: dict[TenantId, int] = {}
        self._heap: list[tuple[Ms, LeaseId]] = []
        # The one heap entry per lease that counts; others of the same lease are leftovers.
        self._due: dict[LeaseId, Ms] = {}
        self._spared_until_ms = Ms(0)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Lease]:
        return map(self._as_spared, self._by_id.values())

    def spare_until(self, at_ms: Ms) -> None:
        """Every lease, those of today and of later, lives at least until then."""
        self._spared_until_ms = at_ms

    def get(self, lease_id: LeaseId) -> Lease | None:
        """The live lease of this id."""
        lease = self._by_id.get(lease_id)
        return lease if lease is None or lease.expires_at_ms >= self._spared_until_ms else self._as_spared(lease)

    def live_of(self, key: LeaseKey) -> Lease | None:
        """The live lease of this key."""
        lease_id = self._by_key.get(key)
        return None if lease_id is None else self._as_spared(self._by_id[lease_id])

    def decoders(self) -> tuple[EngineId, ...]:
        """The engines that live leases name as decoder, ordered."""
        return tuple(sorted(self._by_decoder))

    def of_decoder(self, engine_id: EngineId, *, but_of: Incarnation | None = None) -> tuple[Lease, ...]:
        """Live leases on a decoder, in the order in which they went live; without those of one incarnation."""
        leases = map(self._by_id.__getitem__, self._by_decoder.get(engine_id, ()))
        return tuple([self._as_spared(lease) for lease in leases if lease.decoder.incarnation != but_of])

    def count_of(self, tenant: TenantId) -> int:
        """Live leases of a tenant."""
        return self._of_tenant.get(tenant, 0)

    def add(self, lease: Lease) -> None:
        """A lease goes live. Its id must be new and its key free."""
        assert lease.lease_id not in self._by_id, f"lease id {lease.lease_id} is already live"
        holder = self._by_key.setdefault(lease.key, lease.lease_id)
        assert holder == lease.lease_id, f"{lease.key} already has a live lease"
        self._by_id[lease.lease_id] = lease
        self._by_decoder.setdefault(lease.decoder.engine_id, {})[lease.lease_id] = None
        self._of_tenant[lease.key.tenant] = self.count_of(lease.key.tenant) + 1
        self._schedule(lease)

    def replace(self, lease: Lease) -> None:
        """Put a changed lease in the place of the live one of that id; identity and engines never change."""
        before = self._by_id[lease.lease_id]
        assert (before.key, before.epoch) == (lease.key, lease.epoch), "a lease's identity never changes"
        assert (before.prefiller, before.decoder) == (lease.prefiller, lease.decoder), "a lease's engines never change"
        self._by_id[lease.lease_id] = lease
        if lease.expires_at_ms < self._due[lease.lease_id]:
            self._schedule(lease)

    def prolong(self, lease: Lease, expires_at_ms: Ms) -> Lease:
        """Let a live lease, just read, end later; as it is then. Its entry in the heap is moved on when it comes up."""
        longer = self._by_id[lease.lease_id] = lease.until(expires_at_ms)
        return longer

    def remove(self, lease_id: LeaseId) -> Lease:
        """The lease ends; returned as it was put in."""
        lease = self._by_id.pop(lease_id)
        self.removals += 1
        del self._by_key[lease.key]
        del self._due[lease_id]
        hosted = self._by_decoder[lease.decoder.engine_id]
        del hosted[lease_id]
        if not hosted:
            del self._by_decoder[lease.decoder.engine_id]
        left = self._of_tenant.pop(lease.key.tenant) - 1
        if left:
            self._of_tenant[lease.key.tenant] = left
        return lease

    def next_expiry_ms(self) -> Ms | None:
        """The first instant at which a live lease will be dead, exactly."""
        at_ms = self._first_end_ms()
        return None if at_ms is None else max(at_ms, self._spared_until_ms)

    def first_expired(self, now_ms: Ms) -> Lease | None:
        """The live lease that died first, at or before `now_ms`; ties by id."""
        at_ms = self.next_expiry_ms()
        return None if at_ms is None or now_ms < at_ms else self._as_spared(self._by_id[self._heap[0][1]])

    def _first_end_ms(self) -> Ms | None:
        while self._heap:
            at_ms, lease_id = self._heap[0]
            if self._due.get(lease_id) != at_ms:
                heapq.heappop(self._heap)
                continue
            expires_at_ms = self._by_id[lease_id].expires_at_ms
            if expires_at_ms == at_ms:
                return at_ms
            heapq.heapreplace(self._heap, (expires_at_ms, lease_id))
            self._due[lease_id] = expires_at_ms
        return None

    def _as_spared(self, lease: Lease) -> Lease:
        spared_until_ms = self._spared_until_ms
        return lease if lease.expires_at_ms >= spared_until_ms else lease.until(spared_until_ms)

    def _schedule(self, lease: Lease) -> None:
        self._due[lease.lease_id] = lease.expires_at_ms
        heapq.heappush(self._heap, (lease.expires_at_ms, lease.lease_id))


class Tombstones:
    """Why leases ended, by id, while someone may still come with their tokens. Bounded: the oldest go first."""

    def __init__(self, *, entries_max: int) -> None:
        self._entries_max = entries_max
        self._entries: OrderedDict[LeaseId, tuple[DropReason, LeaseKey, Ms]] = OrderedDict()
        self._unmoved: set[LeaseId] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def bury(self, lease: Lease, reason: DropReason, *, keep_until_ms: Ms) -> None:
        """Remember a lease that ended."""
        self._entries[lease.lease_id] = (reason, lease.key, keep_until_ms)
        if lease.mode is Mode.MIGRATE and not lease.migrations:
            self._unmoved.add(lease.lease_id)
        if len(self._entries) > self._entries_max:
            self._unmoved.discard(self._entries.popitem(last=False)[0])

    def get(self, lease_id: LeaseId) -> tuple[DropReason, LeaseKey] | None:
        """Why the lease ended and whose it was, if still remembered."""
        entry = self._entries.get(lease_id)
        return None if entry is None else entry[:2]

    def take_late_move(self, lease_id: LeaseId) -> bool:
        """Whether a transfer that is reported only now is news; once per lease (invariant 2)."""
        if lease_id not in self._unmoved:
            return False
        self._unmoved.remove(lease_id)
        return True

    def prune(self, now_ms: Ms) -> None:
        """Forget, oldest first, what nobody can come with any more."""
        while self._entries:
            lease_id, entry = next(iter(self._entries.items()))
            if now_ms < entry[2]:
                break
            del self._entries[lease_id]
            self._unmoved.discard(lease_id)

"""Which leases are cold: parked, or idle for at least `idle_after_ms` (TAU).

A cold lease's KV may lie in a host tier; it counts as leased, not as active. One heap entry per gap: a turn that ends
pushes one, and every entry is popped within TAU, so the heap holds no more than the turns of the last TAU and each
costs O(log n). Entries of leases that went on meanwhile are leftovers.
"""

from __future__ import annotations

import heapq

from conserve_sdk.core.lease import Activity, Lease
from conserve_sdk.core.units import LeaseId, Ms


class Idleness:
    """Knows when idle leases become cold, and which are."""

    def __init__(self, *, idle_after_ms: Ms) -> None:
        self._idle_after_ms = idle_after_ms
        self._cold: set[LeaseId] = set()
        self._due: dict[LeaseId, Ms] = {}
        self._heap: list[tuple[Ms, LeaseId]] = []

    def is_cold(self, lease_id: LeaseId) -> bool:
        """Whether the lease is cold."""
        return lease_id in self._cold

    def follow(self, lease: Lease, *, now_ms: Ms) -> bool:
        """Take a live lease that is not followed, as it is now; returns whether it is cold."""
        if lease.activity is Activity.BUSY:
            return False
        at_ms = Ms(lease.activity_since_ms + self._idle_after_ms)
        if lease.activity is Activity.PARKED or at_ms <= now_ms:
            self._cold.add(lease.lease_id)
            return True
        self._due[lease.lease_id] = at_ms
        heapq.heappush(self._heap, (at_ms, lease.lease_id))
        return False

    def forget(self, lease_id: LeaseId) -> bool:
        """The lease ended or changes; returns whether it was cold."""
        self._due.pop(lease_id, None)
        if lease_id not in self._cold:
            return False
        self._cold.remove(lease_id)
        return True

    def next_ms(self) -> Ms | None:
        """When the next lease becomes cold, exactly."""
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def first_due(self, now_ms: Ms) -> LeaseId | None:
        """A lease that becomes cold at or before `now_ms`; it is cold from this call on."""
        at_ms = self.next_ms()
        if at_ms is None or now_ms < at_ms:
            return None
        lease_id = heapq.heappop(self._heap)[1]
        del self._due[lease_id]
        self._cold.add(lease_id)
        return lease_id

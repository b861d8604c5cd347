"""Holds by lease: which finished request holds which lease's KV, and until when.

vLLM 0.32 holds a turn's blocks for one time that is the same for all requests of an engine (`kv_lease_duration`), and
nothing ends a hold early. Here each hold has the time of its own lease, the next turn's hold ends the one before it,
and a lease's hold can be given up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["HOLD_KEY", "HoldBook", "HoldOrder", "hold_params", "read_order"]

HOLD_KEY = "conserve_hold"
"""Among a request's `kv_transfer_params`: whose hold, and how long. Written by the guard, never taken from a client."""
ENTRIES_KEPT = 4_096


@dataclass(frozen=True, slots=True)
class HoldOrder:
    """Hold the KV of this request for its lease; 0 s gives the lease's hold up."""

    lease_id: str
    hold_s: float


def hold_params(lease_id: str, *, hold_ms: int) -> dict[str, Any]:
    """An order as it stands among a request's params."""
    return {HOLD_KEY: {"lease": lease_id, "ms": hold_ms}}


def read_order(params: Mapping[str, Any] | None) -> HoldOrder | None:
    """The order among a request's params; None if there is none, or none that can be understood."""
    order = (params or {}).get(HOLD_KEY)
    if not isinstance(order, Mapping):
        return None
    lease_id, hold_ms = order.get("lease"), order.get("ms")
    if not isinstance(lease_id, str) or not isinstance(hold_ms, int):
        return None
    return HoldOrder(lease_id, max(0, hold_ms) / 1000)


class HoldBook:
    """One engine's holds, by lease. Times are seconds of whatever clock the caller has."""

    def __init__(self) -> None:
        self._holds: dict[str, tuple[str, float]] = {}

    def begin(self, lease_id: str, request_id: str, *, until_s: float, now_s: float) -> str | None:
        """Note a hold; returns the request whose hold it takes the place of, if any."""
        if len(self._holds) >= ENTRIES_KEPT:
            self._holds = {lease: hold for lease, hold in self._holds.items() if hold[1] > now_s}
        previous = self.end(lease_id)
        self._holds[lease_id] = (request_id, until_s)
        return previous

    def end(self, lease_id: str) -> str | None:
        """Forget a lease's hold; returns the request that held, if any."""
        found = self._holds.pop(lease_id, None)
        return found[0] if found else None

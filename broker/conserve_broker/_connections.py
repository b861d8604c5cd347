"""How many connections are open: in all, and of one client's address."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from ipaddress import IPv4Address, ip_address
from typing import Any

__all__ = ["BOUNDS", "Connections", "client_of"]

BOUNDS = ("all", "address")
_PREFIX_BYTES = 8
"""Of an IPv6 address: a machine commonly has a whole /64 to itself."""


class Connections:
    """Counts them against their bounds. Used by one thread.

    Args:
        connections_max: open at once.
        per_address_max: of these, from one client (`client_of`).
    """

    def __init__(self, *, connections_max: int, per_address_max: int) -> None:
        self._connections_max = connections_max
        self._per_address_max = per_address_max
        self._by_client: Counter[bytes] = Counter()
        self._refused = dict.fromkeys(BOUNDS, 0)
        self._open = 0

    @property
    def open(self) -> int:
        """Open now."""
        return self._open

    @property
    def refused(self) -> Mapping[str, int]:
        """Refused so far, by the bound that they would have passed (`BOUNDS`)."""
        return self._refused

    def enter(self, client: bytes) -> bool:
        """Whether one more of this client is within the bounds; it then counts until `leave`."""
        if self._by_client[client] >= self._per_address_max:
            self._refused["address"] += 1
            return False
        if self._open >= self._connections_max:
            self._refused["all"] += 1
            return False
        self._open += 1
        self._by_client[client] += 1
        return True

    def leave(self, client: bytes) -> None:
        """One that had entered was closed."""
        self._open -= 1
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]


def client_of(peer: Any) -> bytes:
    """What counts as one client: an IPv4 address, also one that an IPv6 socket shows, or the /64 of an IPv6 one.

    Args:
        peer: a connection's `peername`; those without one (gone already, Unix sockets) are one client together.
    """
    if not isinstance(peer, tuple):
        return b""
    address = ip_address(peer[0])
    if isinstance(address, IPv4Address):
        return address.packed
    return address.ipv4_mapped.packed if address.ipv4_mapped else address.packed[:_PREFIX_BYTES]

"""The wires between engines of one process: who can be read by whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conserve_lab.emulator.incarnation import Incarnation


class Fabric:
    """A directory of live engines by their NIXL side channel address."""

    def __init__(self) -> None:
        self._by_address: dict[tuple[str, int], Incarnation] = {}

    def join(self, incarnation: Incarnation) -> None:
        """Make a live engine readable."""
        self._by_address[incarnation.kv_address] = incarnation

    def leave(self, incarnation: Incarnation) -> None:
        """Take a dead engine off the wires."""
        if self._by_address.get(incarnation.kv_address) is incarnation:
            del self._by_address[incarnation.kv_address]

    def at(self, host: str, port: int) -> Incarnation | None:
        """Return who listens on a side channel address, or None."""
        return self._by_address.get((host, port))

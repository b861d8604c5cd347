"""Blocks of finished requests that a peer has yet to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conserve_lab.engine_model.blocks import BlockPool
from conserve_lab.engine_model.counters import EngineCounters


@dataclass(slots=True)
class Hold:
    """Blocks of a finished request, kept until a peer has read them or the lease ends."""

    request_id: str
    blocks: tuple[int, ...]
    expires_at_us: int


class Holds:
    """The holds of one engine, by request id. Blocks go back to `pool` when their hold ends."""

    def __init__(self, pool: BlockPool, counters: EngineCounters) -> None:
        self._pool = pool
        self._counters = counters
        self._held: dict[str, Hold] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def blocks(self) -> list[tuple[int, ...]]:
        """The blocks of each hold."""
        return [hold.blocks for hold in self._held.values()]

    def add(self, hold: Hold) -> None:
        """Keep blocks, whose references are the hold's from now on."""
        self._held[hold.request_id] = hold

    def release(self, request_id: str) -> bool:
        """Free a held request's blocks (its peer has read them); False when nothing is held under that id."""
        hold = self._held.pop(request_id, None)
        if hold is None:
            return False
        self._pool.release(hold.blocks)
        return True

    def renew(self, request_id: str, *, until_us: int) -> bool:
        """Let a hold end at `until_us` (a peer's heartbeat); False when it is gone."""
        hold = self._held.get(request_id)
        if hold is None:
            return False
        hold.expires_at_us = until_us
        return True

    def expire(self, *, now_us: int) -> list[str]:
        """Free every hold whose lease has ended by `now_us` and return their request ids."""
        ended = [key for key, hold in self._held.items() if hold.expires_at_us <= now_us]
        for request_id in ended:
            self.release(request_id)
        self._counters.holds_expired += len(ended)
        return ended

    def next_expiry_us(self) -> int | None:
        """Return the instant the next hold ends, or None."""
        return min((hold.expires_at_us for hold in self._held.values()), default=None)

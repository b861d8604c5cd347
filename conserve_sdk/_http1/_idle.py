"""Connections that wait for their next request."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import Generic, Protocol, TypeVar

import httpx2

from conserve_sdk._http1._request import Origin

__all__ = ["IdleConnections"]


class _Quiet(Protocol):
    def is_quiet(self) -> bool:
        """Whether it is open and nothing has arrived on it."""
        ...


C = TypeVar("C", bound=_Quiet)


class IdleConnections(Generic[C]):
    """By where they go; the one that was used last goes first. Not thread-safe.

    Args:
        limits: `max_keepalive_connections` are kept, none for longer than `keepalive_expiry`; None: no bound.
    """

    def __init__(self, limits: httpx2.Limits) -> None:
        self._at_most = inf if limits.max_keepalive_connections is None else limits.max_keepalive_connections
        self._idle_s = inf if limits.keepalive_expiry is None else limits.keepalive_expiry
        self._kept: dict[Origin, deque[tuple[float, C]]] = {}
        self._count = 0
        self._swept_s = 0.0
        self.gone: list[C] = []
        """To be closed by whoever looks next."""

    def take(self, origin: Origin, *, now_s: float) -> C | None:
        """A connection that is fit for use."""
        kept = self._kept.get(origin)
        while kept:
            since_s, connection = kept.pop()
            self._count -= 1
            if now_s - since_s < self._idle_s and connection.is_quiet():
                return connection
            self.gone.append(connection)
        return None

    def put(self, origin: Origin, connection: C, *, now_s: float) -> None:
        """Keep one."""
        self._kept.setdefault(origin, deque()).append((now_s, connection))
        self._count += 1
        if now_s - self._swept_s > self._idle_s or self._count > self._at_most:
            self._sweep(now_s)

    def take_all(self) -> list[C]:
        """Keep none any more."""
        every = [*self.gone, *(connection for kept in self._kept.values() for _, connection in kept)]
        self._kept, self._count, self.gone = {}, 0, []
        return every

    def _sweep(self, now_s: float) -> None:
        """Give up the old ones, also of engines that are asked no more, and the oldest where there are too many."""
        self._swept_s = now_s
        for origin, kept in tuple(self._kept.items()):
            while kept and now_s - kept[0][0] >= self._idle_s:
                self._drop_oldest(kept)
            if not kept:
                del self._kept[origin]
        while self._count > self._at_most:
            self._drop_oldest(min((kept for kept in self._kept.values() if kept), key=lambda kept: kept[0][0]))

    def _drop_oldest(self, kept: deque[tuple[float, C]]) -> None:
        self.gone.append(kept.popleft()[1])
        self._count -= 1

"""Calls to the broker, in both colours over the same builders and parsers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from conserve_sdk.protocol import BatchAnswer, LeaseGrant, LeaseRequest, RenewalBatch, ReportBatch, SupersedeRequest

__all__ = ["AsyncBrokerClient", "BrokerCall", "SyncBrokerClient"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerCall:
    """One request to the broker, not yet sent."""

    method: str
    path: str
    json: Mapping[str, Any] | None
    timeout_s: float
    headers: Mapping[str, str]


class SyncBrokerClient:
    """Blocking calls. Thread-safe; connections are dropped in a forked child.

    Args:
        broker_urls: tried in order, the last one that answered first.
        api_key: sent as `Authorization: Bearer`.
        transport: replaces the network (tests); never closed from here.
        sleep, clock, jitter: replace time (tests); seconds.

    Every call raises `BrokerUnavailable` when no broker answered within the budget, `ProtocolError` for an answer
    that makes no sense, and `LeaseExpired` / `LeaseLost` where the broker says so.
    """

    def __init__(
        self,
        broker_urls: Sequence[str],
        *,
        api_key: str | None = None,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        raise NotImplementedError

    def acquire(self, request: LeaseRequest, *, budget_ms: int) -> LeaseGrant:
        """Ask for a lease; `request.wait_ms` of the budget may pass in the broker's queue.

        Raises:
            LeaseRefused: not admitted within `wait_ms`.
        """
        raise NotImplementedError

    def supersede(self, lease_id: str, request: SupersedeRequest, *, budget_ms: int) -> LeaseGrant:
        """Replace a lease whose engine failed.

        Raises:
            LeaseRefused: not admitted within `wait_ms`.
        """
        raise NotImplementedError

    def park(self, lease_id: str, token: str, *, budget_ms: int = 2_000) -> None:
        """Tell that the conversation waits for a human."""
        raise NotImplementedError

    def release(self, lease_id: str, token: str, *, budget_ms: int = 2_000) -> None:
        """Give a lease back. One that is gone already is no error."""
        raise NotImplementedError

    def report(self, batch: ReportBatch, *, budget_ms: int = 2_000) -> BatchAnswer:
        """Send a batch of reports; results in the same order."""
        raise NotImplementedError

    def renew(self, batch: RenewalBatch, *, budget_ms: int = 2_000) -> BatchAnswer:
        """Renew leases by their tokens; results in the same order."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the connections. Idempotent."""
        raise NotImplementedError


class AsyncBrokerClient:
    """The same calls as coroutines; usable from several event loops. See `SyncBrokerClient`."""

    def __init__(
        self,
        broker_urls: Sequence[str],
        *,
        api_key: str | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        raise NotImplementedError

    async def acquire(self, request: LeaseRequest, *, budget_ms: int) -> LeaseGrant:
        """See `SyncBrokerClient.acquire`."""
        raise NotImplementedError

    async def supersede(self, lease_id: str, request: SupersedeRequest, *, budget_ms: int) -> LeaseGrant:
        """See `SyncBrokerClient.supersede`."""
        raise NotImplementedError

    async def park(self, lease_id: str, token: str, *, budget_ms: int = 2_000) -> None:
        """See `SyncBrokerClient.park`."""
        raise NotImplementedError

    async def release(self, lease_id: str, token: str, *, budget_ms: int = 2_000) -> None:
        """See `SyncBrokerClient.release`."""
        raise NotImplementedError

    async def report(self, batch: ReportBatch, *, budget_ms: int = 2_000) -> BatchAnswer:
        """See `SyncBrokerClient.report`."""
        raise NotImplementedError

    async def renew(self, batch: RenewalBatch, *, budget_ms: int = 2_000) -> BatchAnswer:
        """See `SyncBrokerClient.renew`."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Close this loop's client. Idempotent."""
        raise NotImplementedError

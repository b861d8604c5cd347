"""Reports and renewals, sent by one background thread, off the path of every turn."""

from __future__ import annotations

import time
from collections.abc import Callable

from conserve_sdk._broker_client import SyncBrokerClient
from conserve_sdk._registry import LeaseRegistry
from conserve_sdk.protocol import Report

__all__ = ["Reporter"]


def monotonic_ms() -> int:
    """Whole milliseconds of `time.monotonic`."""
    return time.monotonic_ns() // 1_000_000


class Reporter:
    """Collects reports, sends them in batches, renews leases in use, and feeds the verdicts to the registry.

    Args:
        client: how to reach the broker.
        registry: whose leases are renewed.
        window_ms: a report waits at most this long for company; engine failures do not wait.
        batch_max: a batch this big goes at once.
        queue_max: reports kept while the broker is down; then the oldest are dropped and counted.
        clock: monotonic milliseconds; the registry's times must come from the same clock.
    """

    def __init__(
        self,
        client: SyncBrokerClient,
        registry: LeaseRegistry,
        *,
        window_ms: int = 1_000,
        batch_max: int = 200,
        queue_max: int = 10_000,
        clock: Callable[[], int] = monotonic_ms,
    ) -> None:
        raise NotImplementedError

    @property
    def dropped(self) -> int:
        """Reports given up because the broker was down for too long."""
        raise NotImplementedError

    def submit(self, report: Report) -> None:
        """Queue a report; never blocks and never raises for a broker that is down. Starts the thread if needed.

        Raises:
            LeaseClosed: the reporter was closed.
        """
        raise NotImplementedError

    def wake(self) -> None:
        """Make the thread look again: a lease was stored, so its renewal must be planned."""
        raise NotImplementedError

    def pump(self, now_ms: int) -> int | None:
        """Do all that is due at `now_ms`; return when to look again, None for "when something is submitted"."""
        raise NotImplementedError

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Send everything queued now; False when that did not succeed in time."""
        raise NotImplementedError

    def close(self, timeout_s: float = 5.0) -> None:
        """Flush, stop and join the thread. Idempotent."""
        raise NotImplementedError

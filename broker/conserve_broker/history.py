"""Totals of the last quarter of an hour, for whoever opens the dashboard now.

No timer: a sample is taken while something happens anyway (scrapes alone happen once a second), so a broker that nobody
watches pays one comparison per event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from conserve_broker.service import Observer
from conserve_sdk._desk import Outcome
from conserve_sdk.core import Broker

__all__ = ["FIELDS", "SAMPLE_EVERY_MS", "Everyone", "History", "totals_of"]

SAMPLE_EVERY_MS = 5_000
SAMPLES_MAX = 181

FIELDS = ("grants", "waits", "refusals", "migrations", "spill_overs", "failovers")


def totals_of(core: Broker) -> tuple[int, ...]:
    """The totals named by `FIELDS`, since this broker began to decide."""
    counters = core.counters
    return (
        counters.granted,
        counters.queued,
        sum(counters.refused.values()),
        counters.migrations,
        counters.spilled,
        counters.failed_over,
    )


class History(Observer):
    """A ring of samples: the instant, then the totals."""

    def __init__(self) -> None:
        self._core: Broker | None = None
        self._samples: deque[tuple[int, ...]] = deque(maxlen=SAMPLES_MAX)
        self._due_ms = 0

    @property
    def samples(self) -> tuple[tuple[int, ...], ...]:
        """Oldest first."""
        return tuple(self._samples)

    def watch(self, core: Broker) -> None:
        """Sample this core from now on; its totals begin at zero, so earlier samples mean nothing any more."""
        self.forget()
        self._core = core

    def forget(self) -> None:
        """Another broker leads."""
        self._core = None
        self._samples.clear()
        self._due_ms = 0

    def decided(self, outcome: Outcome) -> None:
        """See `Observer.decided`."""
        if self._core is None or not outcome.events:
            return
        now_ms = outcome.events[-1].now_ms
        if now_ms >= self._due_ms:
            self._due_ms = now_ms + SAMPLE_EVERY_MS
            self._samples.append((now_ms, *totals_of(self._core)))


class Everyone(Observer):
    """Several observers as one; each hears everything, in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def handled(self, route: str, seconds: float) -> None:
        """See `Observer.handled`."""
        for each in self._observers:
            each.handled(route, seconds)

    def decided(self, outcome: Outcome) -> None:
        """See `Observer.decided`."""
        for each in self._observers:
            each.decided(outcome)

    def committed(self, seconds: float) -> None:
        """See `Observer.committed`."""
        for each in self._observers:
            each.committed(seconds)

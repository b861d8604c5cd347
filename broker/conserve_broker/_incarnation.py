"""Tell one life of an engine from the next: vLLM does not name it, so it is derived from its metrics page."""

from __future__ import annotations

from conserve_broker.metrics_page import EngineMetrics
from conserve_sdk.core.units import Incarnation


class IncarnationWatch:
    """The incarnation of one engine over consecutive pages.

    The process's start time names it, so that a restarted broker finds the same name again. A server that leaves the
    start time out (vLLM with `--api-server-count` above 1) is numbered from 0 up instead, a new number whenever its
    counters went backwards; a restart between two pages after which the server already did more work than before goes
    unseen, and costs time, never an answer.
    """

    def __init__(self) -> None:
        self._started_at_s: float | None = None
        self._work_tokens = 0
        self._generation = 0

    def observe(self, metrics: EngineMetrics) -> Incarnation:
        """The incarnation that served this page."""
        if metrics.started_at_s is not None:
            self._started_at_s = metrics.started_at_s
        elif metrics.work_tokens_total < self._work_tokens:
            self._started_at_s = None
            self._generation += 1
        self._work_tokens = metrics.work_tokens_total
        if self._started_at_s is not None:
            return Incarnation(f"started-{self._started_at_s:.2f}")
        return Incarnation(f"counted-{self._generation}")

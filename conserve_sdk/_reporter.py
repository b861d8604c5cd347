"""Reports and renewals, sent by one background thread, off the path of every turn."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conserve_sdk._broker_client import SyncBrokerClient
from conserve_sdk._fork import call_in_forked_child
from conserve_sdk._registry import LeaseRegistry
from conserve_sdk.core._quick import quick_init
from conserve_sdk.core.units import LeaseId
from conserve_sdk.errors import AccessDenied, BrokerUnavailable, ConServeError, LeaseClosed, RateLimited
from conserve_sdk.protocol import RENEWALS_MAX, REPORTS_MAX, LeaseGrant, LeaseStatus, RenewalBatch, Report, ReportBatch

__all__ = ["Reporter", "monotonic_ms"]

BACKOFF_FIRST_MS = 500
BACKOFF_MAX_MS = 10_000
IDLE_EXIT_S = 30.0
"""A thread with nothing to do for this long ends; the next report starts another one."""

_logger = logging.getLogger("conserve_sdk.reporter")


def monotonic_ms() -> int:
    """Whole milliseconds of `time.monotonic`."""
    return time.monotonic_ns() // 1_000_000


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class _Queued:
    report: Report
    lease_id: LeaseId | None
    submitted_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _GivenBack:
    grant: LeaseGrant
    at_ms: int


class Reporter:
    """Collects reports, sends them in batches, renews leases in use, and feeds the verdicts to the registry.

    Args:
        client: how to reach the broker.
        registry: whose leases are renewed.
        window_ms: a report waits at most this long for company; engine failures do not wait.
        batch_max: a batch this big goes at once.
        queue_max: reports kept while the broker is down; then the oldest are dropped and counted.
        call_budget_ms: time one call to the broker may take, attempts included.
        threaded: False: nothing runs by itself, the owner calls `pump`.
        clock: monotonic milliseconds; the registry's times must come from the same clock.
    """

    _changed: threading.Condition
    _queue: deque[_Queued]
    _given_back: deque[_GivenBack]
    _thread: threading.Thread | None
    _urgent: bool
    _noticed: bool
    _tick_at_ms: int | None
    """When the thread sends whatever is queued then, without having been woken for it: set while reports keep coming,
    as waking it costs a turn more than all else that is done for its report."""
    _batches: int
    _retry_at_ms: int
    _backoff_ms: int
    _submitted: int
    _settled: int
    _failures: int

    def __init__(
        self,
        client: SyncBrokerClient,
        registry: LeaseRegistry,
        *,
        window_ms: int = 1_000,
        batch_max: int = 200,
        queue_max: int = 10_000,
        call_budget_ms: int = 2_000,
        threaded: bool = True,
        clock: Callable[[], int] = monotonic_ms,
    ) -> None:
        self._client = client
        self._registry = registry
        self._window_ms = window_ms
        self._batch_max = min(batch_max, REPORTS_MAX)
        self._queue_max = queue_max
        self._call_budget_ms = call_budget_ms
        self._threaded = threaded
        self._clock = clock
        self._closed = False
        self._dropped = 0
        self._start_afresh()
        call_in_forked_child(self._start_afresh)

    @property
    def dropped(self) -> int:
        """Reports given up because the broker was down for too long or did not understand them."""
        return self._dropped

    def submit(self, report: Report) -> None:
        """Queue a report; never blocks and never raises for a broker that is down. Starts the thread if needed.

        Raises:
            LeaseClosed: the reporter was closed.
        """
        lease_id = self._registry.lease_of_token(report.token)
        with self._changed:
            if self._closed:
                raise LeaseClosed("closed: make a new ConServe object for new turns", lease_id=lease_id)
            self._queue.append(_Queued(report=report, lease_id=lease_id, submitted_at_ms=self._clock()))
            self._submitted += 1
            if report.kind == "engine_failure" or len(self._queue) >= self._batch_max:
                self._urgent = True
            self._drop_excess()
            if self._urgent or (len(self._queue) == 1 and self._tick_at_ms is None):  # else the thread will look
                self._notice()

    def give_back(self, grant: LeaseGrant) -> None:
        """Release a lease, behind the reports queued so far; never blocks. One that is not taken ends by its time."""
        with self._changed:
            if self._closed:
                return
            self._given_back.append(_GivenBack(grant=grant, at_ms=self._clock()))
            self._submitted += 1
            self._notice()

    def wake(self) -> None:
        """Make the thread look again: a lease came into use, so its renewal must be planned."""
        with self._changed:
            if not self._closed:
                self._notice()

    def pump(self, now_ms: int) -> int | None:
        """Do all that is due at `now_ms`.

        Args:
            now_ms: on the reporter's clock.

        Returns:
            When to look again; None: not before something is submitted or a lease comes into use.
        """
        more = True
        while more:  # renewals in between: a long queue and a slow broker must not cost a lease its life
            more = self._send_batch(now_ms)
            now_ms = max(now_ms, self._clock())
            if now_ms >= self._retry_at_ms:
                self._renew(now_ms)
        self._release(now_ms)
        with self._changed:
            report_at = self._queue[0].submitted_at_ms + self._window_ms if self._queue else None
            renew_at = self._registry.next_renewal_ms(now_ms=now_ms)
            release_at = now_ms if self._given_back and not self._queue else None
            wakes = [at for at in (report_at, renew_at, release_at) if at is not None]
            return max(min(wakes), self._retry_at_ms) if wakes else None

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Send everything queued now.

        Returns:
            False when the broker did not take it, or not in time. What it did not take stays queued.
        """
        with self._changed:
            target, failures = self._submitted, self._failures
            if self._settled >= target:
                return True  # and no thread is started for it: Python 3.12 starts none while it shuts down
            self._urgent = bool(self._queue)
            self._retry_at_ms = 0
            if self._threaded:
                self._notice()
                self._changed.wait_for(lambda: self._settled >= target or self._failures > failures, timeout=timeout_s)
        if not self._threaded:
            self.pump(self._clock())
        return self._settled >= target

    def close(self, timeout_s: float = 5.0) -> None:
        """Flush, stop and join the thread. Idempotent. Reports that the broker does not take are counted as dropped."""
        if not self._closed and not self.flush(timeout_s):
            _logger.warning("reports_dropped count=%d: the broker did not take them before close", len(self._queue))
        with self._changed:
            self._closed = True
            self._dropped += len(self._queue)
            self._queue.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def _start_afresh(self) -> None:
        # Also in a forked child, where the thread is gone and the parent reports what was queued.
        self._changed = threading.Condition()
        self._queue = deque()
        self._given_back = deque()
        self._thread = None
        self._urgent = False
        self._noticed = False
        self._tick_at_ms = None
        self._batches = 0
        self._retry_at_ms = 0
        self._backoff_ms = 0
        self._submitted = self._settled = self._failures = 0

    def _notice(self) -> None:
        """Wake the thread, or start it. The lock is held."""
        self._noticed = True
        if not self._threaded:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="conserve-reporter", daemon=True)
            _running.add(self)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            wake_at_ms = self._look()
            with self._changed:
                if not self._wait(wake_at_ms) or self._closed:
                    self._thread = None
                    return

    def _look(self) -> int | None:
        """`pump`, and all that is queued if this is the regular look; returns when to look again."""
        with self._changed:
            self._noticed = False
            if self._tick_at_ms is not None and self._clock() >= self._tick_at_ms:
                self._tick_at_ms = None
                self._urgent = self._urgent or bool(self._queue)
            batches = self._batches
        wake_at_ms = self._pump_safely()
        with self._changed:
            if self._batches > batches:
                self._tick_at_ms = self._clock() + self._window_ms
            wakes = [at for at in (wake_at_ms, self._tick_at_ms) if at is not None]
            return min(wakes, default=None)

    def _pump_safely(self) -> int | None:
        now_ms = self._clock()
        try:
            return self.pump(now_ms)
        except Exception:  # a mistake of ours must not end reporting for the life of the process
            _logger.exception("reporter_failed; trying again")
            return now_ms + BACKOFF_MAX_MS

    def _wait(self, wake_at_ms: int | None) -> bool:
        """Sleep until there is something to do; False when there has been nothing for long. The lock is held."""
        if wake_at_ms is None:
            return self._changed.wait_for(lambda: self._noticed or self._closed, timeout=IDLE_EXIT_S)
        pause_s = (wake_at_ms - self._clock()) / 1000
        if pause_s > 0:
            self._changed.wait_for(lambda: self._noticed or self._closed, timeout=pause_s)
        return True

    def _send_batch(self, now_ms: int) -> bool:
        """Send one batch if one is due; True when the next one may be tried at once."""
        with self._changed:
            if not self._is_batch_due(now_ms):
                return False
            batch = [self._queue.popleft() for _ in range(min(self._batch_max, len(self._queue)))]
        try:
            answer = self._client.report(
                ReportBatch(reports=tuple(entry.report for entry in batch)), budget_ms=self._call_budget_ms
            )
        except (BrokerUnavailable, AccessDenied, RateLimited) as exc:
            self._put_back(batch, now_ms, exc)
            return False
        except ConServeError as exc:
            self._give_up(batch, exc)
            return True
        self._batches += 1
        self._apply(answer.results, [entry.lease_id for entry in batch], now_ms)
        self._settle(len(batch))
        return True

    def _is_batch_due(self, now_ms: int) -> bool:
        if not self._queue:
            self._urgent = False
            return False
        if now_ms < self._retry_at_ms:
            return False
        return self._urgent or now_ms - self._queue[0].submitted_at_ms >= self._window_ms

    def _renew(self, now_ms: int) -> None:
        due = self._registry.due_renewals(now_ms=now_ms)
        for start in range(0, len(due), RENEWALS_MAX):
            part = due[start : start + RENEWALS_MAX]
            try:
                answer = self._client.renew(
                    RenewalBatch(tokens=tuple(grant.token for grant in part)), budget_ms=self._call_budget_ms
                )
            except ConServeError as exc:
                self._back_off(now_ms, exc)
                return
            self._apply(answer.results, [LeaseId(grant.lease_id) for grant in part], now_ms)
            self._settle(0)

    def _release(self, now_ms: int) -> None:
        while now_ms >= self._retry_at_ms:
            with self._changed:
                behind = (
                    self._queue and self._given_back and self._queue[0].submitted_at_ms <= self._given_back[0].at_ms
                )
                if behind or not self._given_back:
                    return
                grant = self._given_back.popleft().grant
            try:
                self._client.release(grant.lease_id, grant.token, budget_ms=self._call_budget_ms)
            except ConServeError as exc:
                _logger.info("release_failed lease_id=%s: %s", grant.lease_id, exc)
            self._settle(1)

    def _apply(self, results: Sequence[LeaseStatus], lease_ids: Sequence[LeaseId | None], sent_at_ms: int) -> None:
        for status, lease_id in zip(results, lease_ids, strict=True):
            self._registry.apply_status(status, sent_at_ms=sent_at_ms, lease_id=lease_id)

    def _settle(self, count: int) -> None:
        with self._changed:
            self._settled += count
            self._backoff_ms = 0
            self._changed.notify_all()

    def _put_back(self, batch: list[_Queued], now_ms: int, exc: ConServeError) -> None:
        with self._changed:
            if self._closed:
                self._dropped += len(batch)
            else:
                self._queue.extendleft(reversed(batch))
                self._drop_excess()
        self._back_off(now_ms, exc)

    def _give_up(self, batch: list[_Queued], exc: ConServeError) -> None:
        """Drop a batch that the broker will never take: it must not block the ones behind it."""
        _logger.error("reports_dropped count=%d: %s", len(batch), exc)
        with self._changed:
            self._dropped += len(batch)
        self._settle(len(batch))

    def _back_off(self, now_ms: int, exc: ConServeError) -> None:
        with self._changed:
            if not self._backoff_ms:
                _logger.warning("broker_unreachable: %s; reports wait, leases live on until their time", exc)
            self._backoff_ms = min(BACKOFF_MAX_MS, self._backoff_ms * 2 or BACKOFF_FIRST_MS)
            self._retry_at_ms = now_ms + self._backoff_ms
            self._failures += 1
            self._changed.notify_all()

    def _drop_excess(self) -> None:
        """Keep the newest: a later report of a lease says what an earlier one did. The lock is held."""
        while len(self._queue) > self._queue_max:
            self._queue.popleft()
            self._dropped += 1
            self._settled += 1


_running: weakref.WeakSet[Reporter] = weakref.WeakSet()


@atexit.register
def _flush_at_exit() -> None:
    for reporter in tuple(_running):
        reporter.close(timeout_s=1.0)

"""Tells brokers of conversations that wait for a person, beside the run that found out and never in its way."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from conserve_sdk import ConServe
from conserve_sdk._fork import call_in_forked_child

WORKERS = 4
STALE_S = 10.0
"""A lease that could not be parked for this long has not been renewed for as long: it runs out by itself."""

log = logging.getLogger("conserve_langgraph")


class Parking:
    """Parks in threads of its own: event loops go on, and a loop that ends right after its run takes nothing along.

    The interpreter waits for them at its end.

    Args:
        clock_s: monotonic seconds.
    """

    _lock: threading.Lock
    _pool: ThreadPoolExecutor | None

    def __init__(self, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._start_afresh()
        call_in_forked_child(self._start_afresh)

    def park(self, conserve: ConServe, conversation: str, *, unless: Callable[[], bool]) -> None:
        """Park a conversation's leases soon.

        Args:
            conserve: who holds them.
            conversation: as it goes over the wire.
            unless: asked right before: whether the person has answered and the conversation goes on.
        """
        queued_at_s = self._clock_s()

        def work() -> None:
            if self._clock_s() - queued_at_s > STALE_S or unless():
                return
            try:
                parked = conserve.park(conversation)
                log.debug("parked conversation=%s leases=%d", conversation, parked)
            except Exception as error:  # noqa: BLE001 -- nobody is there to catch it, and the lease runs out anyway
                log.info("park_failed conversation=%s error=%s", conversation, error)

        try:
            self._workers().submit(work)
        except RuntimeError:  # the interpreter is ending and takes no new work
            log.debug("not_parked conversation=%s: the program ends", conversation)

    def _workers(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="conserve-park")
            return self._pool

    def _start_afresh(self) -> None:
        # Also in a forked child, which has none of the parent's threads.
        self._lock = threading.Lock()
        self._pool = None

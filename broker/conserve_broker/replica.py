"""One of several brokers over the same store: it stands by with a warm table, leads while it holds the lock.

A thread of its own does all of it, so that the lock is kept while the event loop is busy (taking over 100 000 leases,
say) and so that reading the others' changes costs the loop nothing. What counts is the fence: every write names the
lock's value, and the store refuses it once somebody else leads. The local deadline (`leads`) only spares a broker that
was paused or cut off from answering what it can no longer know.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Mapping

from conserve_broker._lease_codec import decode
from conserve_broker.clock import BrokerClock, ResponsiveLoop
from conserve_broker.journal import Journal, JournalError, Recovery, collector_paused
from conserve_broker.redis_store import Claim, LeaderRows, LogPosition, RedisStore
from conserve_sdk.core import Broker
from conserve_sdk.core.events import JournalFollowed
from conserve_sdk.core.lease import Lease
from conserve_sdk.core.units import EngineId, LeaseId

__all__ = ["Replica"]

_DRIFT = 0.95
"""Share of the lock's life that counts here: two machines' clocks may run at different speeds."""
_RETRY_S = 0.1
_POLLS_PER_TTL = 20
_POLL_MIN_MS, _POLL_MAX_MS = 20, 200


class Replica:
    """Runs for leadership until it is stopped.

    Args:
        store: makes a connection to the store; called once for the thread and once for each leadership.
        new_core: makes an empty state machine, into which the leader's leases go as they change.
        freeze_gc: see `BrokerService`.
        url: where this broker answers, told to clients by the others.
        elected: called in the thread with the journal of the new leadership.
        deposed: called in the thread with the reason when the lock is lost.
        loop: tells whether whoever answers requests still does; a leader that hangs gives the lock up.
    """

    def __init__(
        self,
        store: Callable[[], RedisStore],
        *,
        new_core: Callable[[], Broker],
        url: str,
        elected: Callable[[Journal, Claim], None],
        deposed: Callable[[str], None],
        loop: ResponsiveLoop,
        freeze_gc: bool = False,
    ) -> None:
        self._connect = store
        self._store = store()
        self._url = url
        self._elected = elected
        self._deposed = deposed
        self._loop = loop
        settings = self._store.settings
        self._ttl_s = settings.lock_ttl_ms / 1000
        self._poll_ms = max(_POLL_MIN_MS, min(_POLL_MAX_MS, settings.lock_ttl_ms // _POLLS_PER_TTL))
        self._new_core = new_core
        self._freeze_gc = freeze_gc
        self._clock = BrokerClock()  # of this thread; the service's own goes on from where the core stands
        self._core: Broker | None = None
        self._position = LogPosition("0-0", 0)
        self._fence = 0
        self._valid_until_s = 0.0
        self._claim: Claim | None = None
        self._refused: Claim | None = None
        self._leader_url = ""
        self._failure = ""
        self._stopping = threading.Event()
        self._release = True
        self._thread = threading.Thread(target=self._run, name="conserve-replica", daemon=True)

    # ---- from other threads -------------------------------------------------------------------------------------

    def leads(self) -> bool:
        """Whether the lock is surely ours at this instant."""
        return time.monotonic() < self._valid_until_s and self._claim is not self._refused

    @property
    def follows(self) -> bool:
        """Whether this broker knows the leases, so that it could lead at once."""
        return self._core is not None or self._valid_until_s > 0

    @property
    def leader_url(self) -> str:
        """Where the leader answers; empty when there is none, or it does not say."""
        return self._leader_url

    @property
    def failure(self) -> str:
        """What keeps the store from being used; empty when it is in order."""
        return self._failure

    @property
    def retry_after_ms(self) -> int:
        """When it is worth asking again."""
        return 2 * self._poll_ms

    def start(self) -> None:
        """Begin to stand by."""
        self._thread.start()

    def stop(self, *, release: bool = True) -> None:
        """End. With `release` a standby takes over at once; without it the lock runs out, as after a crash."""
        self._release = release
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    # ---- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._stand_by()
                except JournalError as error:
                    self._failure, self._leader_url = str(error), ""
                    self._stopping.wait(_RETRY_S)
                except Exception as fault:  # noqa: BLE001  # a replica that gave up for good would look like a standby
                    self._failure, self._leader_url = f"the replica failed and begins anew: {fault!r}", ""
                    self._valid_until_s, self._core = 0.0, None
                    self._deposed(self._failure)
                    self._stopping.wait(1.0)
        finally:
            self._valid_until_s = 0.0
            self._store.close()

    def _stand_by(self) -> None:
        if self._core is None:
            self._read_all()
        while not self._stopping.is_set():
            if not self._loop.responds():
                raise JournalError("this broker hangs and does not run for leadership")
            asked_s = time.monotonic()
            claim = self._store.claim(url=self._url, fence_floor=self._fence)
            self._failure = ""
            self._fence = max(self._fence, claim.fence)
            self._leader_url = claim.url
            if claim.won:
                self._lead(claim, asked_s)
                return
            self._follow(until_s=asked_s + max(1, min(claim.left_ms + 1, self._poll_ms)) / 1000)

    def _lead(self, claim: Claim, asked_s: float) -> None:
        try:
            recovery, asked_s = self._catch_up(claim, asked_s)
        except JournalError:
            with contextlib.suppress(JournalError):  # the first error is the one to report
                self._store.release(claim)
            raise
        self._claim = claim
        rows = LeaderRows(self._connect(), claim, fenced=lambda: self._fenced(claim))
        self._valid_until_s = asked_s + self._ttl_s * _DRIFT
        self._core = None  # the service's from now on
        self._elected(Journal(rows, recovery=recovery), claim)
        reason = self._keep(claim)
        self._valid_until_s = 0.0
        self._leader_url = ""
        if reason:
            self._deposed(reason)
        elif self._release:
            self._store.release(claim)

    def _keep(self, claim: Claim) -> str:
        """Renew the lock until it is lost (why) or the replica stops (nothing)."""
        pause_s = self._ttl_s / 3
        while not self._stopping.wait(pause_s):
            asked_s = time.monotonic()
            if not self._loop.responds():
                return "the broker hangs and lets another one lead"
            try:
                kept = self._store.renew(claim)
            except JournalError as error:
                self._failure = str(error)
                if time.monotonic() >= self._valid_until_s:
                    return str(error)
                pause_s = min(_RETRY_S, self._ttl_s / 10)
                continue
            self._failure = ""
            if not kept or self._refused is claim:
                return "the lock was lost to another broker, or ran out"
            self._valid_until_s = asked_s + self._ttl_s * _DRIFT
            pause_s = self._ttl_s / 3
        return ""

    def _fenced(self, claim: Claim) -> None:
        self._refused = claim

    # ---- the table ----------------------------------------------------------------------------------------------

    def _read_all(self) -> None:
        self._position = self._store.position()  # first, so that no change falls between
        core = self._new_core()
        with collector_paused():
            self._follow_rows(core, self._store.lease_rows())
        if self._freeze_gc:
            gc.freeze()  # or the collector would soon walk all of them, perhaps while callers wait for a leader
        self._core = core

    def _follow_rows(self, core: Broker, rows: Mapping[str, str | None]) -> None:
        stored = tuple([_decoded(row) for row in rows.values() if row is not None])
        dropped = tuple([LeaseId(lease_id) for lease_id, row in rows.items() if row is None])
        for lease in stored:
            self._clock.not_before(lease.granted_at_ms)
        core.apply(JournalFollowed(now_ms=self._clock.now_ms(), stored=stored, dropped=dropped))

    def _follow(self, *, until_s: float) -> None:
        """Take over what the leader changes, until then or until it gives the lock back."""
        while (left_ms := round((until_s - time.monotonic()) * 1000)) > 0 and not self._stopping.is_set():
            before = self._position
            lease_ids = self._take(block_ms=left_ms)
            if self._position != before and not lease_ids:
                return

    def _take(self, *, block_ms: int = 0) -> list[str]:
        found = self._store.changed_after(self._position, block_ms=block_ms)
        if found is None:
            self._read_all()
            return []
        self._position, lease_ids = found
        assert self._core is not None, "read before it is followed"
        self._follow_rows(self._core, self._store.fetch(lease_ids))
        return lease_ids

    def _catch_up(self, claim: Claim, asked_s: float) -> tuple[Recovery, float]:
        """Everything there is, now that nobody else can write; and from when on the lock's life counts."""
        end = self._store.position()
        while self._position.seq < end.seq:
            before = self._position
            self._take()
            if self._position == before:
                break
        if self._position.seq != end.seq:  # the store lost its log, or its memory
            self._read_all()
        draining = tuple(EngineId(engine_id) for engine_id in self._store.draining())
        recovery = Recovery((), draining, tuple(self._store.engines()), core=self._core)
        if time.monotonic() - asked_s > self._ttl_s / 3:
            asked_s = time.monotonic()
            if not self._store.renew(claim):
                raise JournalError("store: the lock ran out while its leases were read; raise store.lock_ttl_ms")
        return recovery, asked_s


def _decoded(row: str) -> Lease:
    try:
        return decode(row)
    except ValueError as error:
        raise JournalError(
            f"store: holds a lease of an unknown form ({error}); is another version of ConServe running on it?"
        ) from error

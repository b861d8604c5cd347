"""The journal: what the broker must still know after a crash, durable before it answers.

Natural group commit: one writer thread commits whatever queued up while the previous commit ran, so that an idle
broker waits for one fsync and a busy one shares it among hundreds of changes. Renewals are not journalled; the grace
after a restart covers them.
"""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from conserve_broker._journal_file import JournalError, JournalFile, RowStore
from conserve_broker._lease_codec import decode, encode, encode_candidates
from conserve_sdk.core import Broker
from conserve_sdk.core.decisions import LeaseDropped, LeaseStored
from conserve_sdk.core.lease import Lease
from conserve_sdk.core.units import EngineId, LeaseId

__all__ = [
    "Change",
    "DrainFlag",
    "EngineRow",
    "Journal",
    "JournalError",
    "JournalPort",
    "MemoryJournal",
    "Recovery",
    "RowStore",
    "collector_paused",
    "open_journal",
    "read_recovery",
]

_RETRY_S = 1.0
_GROUP_MAX = 5_000


@dataclass(frozen=True, slots=True)
class DrainFlag:
    """An operator drained (or undrained) an engine; that outlives a restart of the broker."""

    engine_id: EngineId
    draining: bool


@dataclass(frozen=True, slots=True)
class EngineRow:
    """What is known of an engine that no configuration file names; None: it left."""

    engine_id: EngineId
    row: str | None


Change = LeaseStored | LeaseDropped | DrainFlag | EngineRow


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found at the start.

    Attributes:
        leases: in no order.
        engines: rows of engines that no configuration file names.
        core: holds the leases already; a standby's, which followed the leader that wrote them.
    """

    leases: tuple[Lease, ...] = ()
    draining: tuple[EngineId, ...] = ()
    engines: tuple[str, ...] = ()
    core: Broker | None = None


class JournalPort(Protocol):
    """What the broker needs of a journal."""

    @property
    def failure(self) -> str:
        """Why the last write failed; empty when the journal is in order."""

    @property
    def fresh_files(self) -> int:
        """How often a file was taken up that knows nothing of what lives, and wants to be told."""

    def load(self) -> Recovery:
        """Everything that is stored."""

    def submit(self, changes: Sequence[Change]) -> Future[None]:
        """Make the changes durable, in order and all together; the future ends when they are."""

    def candidates(self, lease_id: LeaseId) -> Future[str | None]:
        """What a recovered lease's receipt said of other engines, if it is to be had; see `take_down`."""

    def close(self) -> None:
        """Write what is queued and give the file back."""

    def abandon(self) -> None:
        """Stop as a crash would: what is queued is lost, what was acknowledged is kept."""


def open_journal(path: str) -> JournalPort:
    """The journal of a configuration: a file, or memory for an empty path.

    Raises:
        JournalError: the file cannot be used; the message says why and what to do.
    """
    return Journal.open(path) if path else MemoryJournal()


class Journal:
    """A journal in one SQLite file. `submit` may be called from any thread.

    After a failed write (disk full, say) the changes are kept and tried again every second together with newer ones,
    so that file and memory agree again as soon as the disk does. A damaged file is given up: the journal looks every
    second whether somebody put it away, and goes on with an empty one (see `fresh_files`).

    Args:
        file: where the rows are kept; None when it cannot be opened yet.
        reopen: opens it anew after damage; None: never.
        failure: why there is no file.
        recovery: what `load` gives back, where it is known already; None: `load` reads the file.
    """

    def __init__(
        self,
        file: RowStore | None,
        *,
        reopen: Callable[[], RowStore] | None = None,
        failure: str = "",
        recovery: Recovery | None = None,
    ) -> None:
        self._file = file
        self._recovery = recovery
        self._reopen = reopen
        self._fresh_files = 0
        self._queue: queue.SimpleQueue[_Job | _Question | None] = queue.SimpleQueue()
        self._pending = _Pending()
        self._failure = failure
        self._lock = threading.Lock()
        self._closed = False
        self._abandoned = False
        self._writer = threading.Thread(target=self._write_groups, name="conserve-journal", daemon=True)
        self._writer_started = False

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open or make the file and lock it.

        A file that the disk is to blame for (damaged, read-only, no room) is no reason not to start: running
        conversations live on by their tokens, and new leases wait for the file.

        Raises:
            JournalError: it belongs to somebody else, is no journal, newer, or in use by another broker.
        """

        def reopen() -> RowStore:
            return JournalFile(Path(path))

        try:
            file = JournalFile(Path(path))
        except JournalError as error:
            if not error.passing:
                raise
            return cls(None, reopen=reopen, failure=str(error))
        journal = cls(file, reopen=reopen)
        journal._fresh_files += file.upgraded
        return journal

    @property
    def failure(self) -> str:
        """Why the last write failed; empty when the journal is in order."""
        return self._failure

    @property
    def fresh_files(self) -> int:
        """How often a file was taken up that knows nothing of what lives, or in an older form, and wants to be told."""
        return self._fresh_files

    def load(self) -> Recovery:
        """Everything that is stored. Called once, before the first `submit`.

        Raises:
            JournalError: the file cannot be read or holds rows of an unknown form.
        """
        if self._writer_started:
            raise JournalError("journal: load() comes before the first submit()")
        if self._file is None:
            self._start_writer()  # it looks for the file
            return Recovery()
        recovery, self._recovery = self._recovery, None
        return recovery or read_recovery(self._file)

    def _start_writer(self) -> None:
        if not self._writer_started:
            self._writer_started = True
            self._writer.start()

    def submit(self, changes: Sequence[Change]) -> Future[None]:
        """Make the changes durable, in order and all together; the future ends when they are.

        The future carries a `JournalError` when the write failed or the journal is closed; it cannot be cancelled.
        """
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                done.set_exception(JournalError("journal: is closed"))
                return done
            self._start_writer()
            self._queue.put(_Job(tuple(changes), done))
        return done

    def candidates(self, lease_id: LeaseId) -> Future[str | None]:
        """See `JournalPort.candidates`. Read by the thread that writes, in its turn; never fails."""
        found: Future[str | None] = Future()
        found.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                found.set_result(None)
            else:
                self._start_writer()
                self._queue.put(_Question(lease_id, found))
        return found

    def close(self) -> None:
        """Write what is queued and give the file back. Safe to call twice."""
        self._stop()

    def abandon(self) -> None:
        """Stop as a crash would: what is queued is lost, what was acknowledged is kept."""
        self._abandoned = True
        self._stop()

    def _stop(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        if self._writer_started:
            self._writer.join()
        if self._file is not None:
            self._file.close()

    def _write_groups(self) -> None:
        while True:
            group, last = self._next_group()
            jobs = [each for each in group if isinstance(each, _Job)]
            if jobs or self._unsettled():
                self._commit(jobs)
            for each in group:
                if isinstance(each, _Question):
                    each.found.set_result(self._look_up(each.lease_id))
            if last:
                return

    def _next_group(self) -> tuple[list[_Job | _Question], bool]:
        """Everything that is queued, after waiting for the first; True when the journal is closing."""
        group: list[_Job | _Question] = []
        try:
            item = self._queue.get(timeout=_RETRY_S if self._unsettled() else None)
            while item is not None:
                group.append(item)
                if len(group) >= _GROUP_MAX:
                    return group, False
                item = self._queue.get_nowait()
        except queue.Empty:
            return group, False
        return group, True

    def _look_up(self, lease_id: LeaseId) -> str | None:
        try:
            return None if self._file is None or self._abandoned else self._file.candidates(lease_id)
        except JournalError:
            return None  # a receipt without the other engines is better than no receipt

    def _commit(self, jobs: list[_Job]) -> None:
        error: JournalError | None = None
        if self._abandoned:
            error = JournalError("journal: was abandoned")
        else:
            try:
                for job in jobs:
                    self._pending.add(job.changes)
                pending = self._pending
                self._opened().write(pending.leases, pending.drains, pending.engines, pending.candidates)
            except JournalError as failure:
                error = failure
                self._failure = str(failure)
                if failure.damaged and self._reopen is not None and self._file is not None:
                    self._file.close()
                    self._file = None
            except Exception as fault:  # noqa: BLE001  # whatever it is, the callers that wait must hear of it
                error = JournalError(f"journal: a change could not be written and is left out ({fault!r})")
                self._failure = str(error)
                self._pending = _Pending()
            else:
                self._pending = _Pending()
                self._settle()
        for job in jobs:
            if error is None:
                job.done.set_result(None)
            else:
                job.done.set_exception(error)

    def _unsettled(self) -> bool:
        return bool(self._pending or self._failure or self._file is None)

    def _settle(self) -> None:
        """A write went through. After a failure that may have been a deletion for which there is always room."""
        if not self._failure:
            return
        try:
            self._opened().prove()
        except JournalError as error:
            self._failure = str(error)
        else:
            self._failure = ""

    def _opened(self) -> RowStore:
        if self._file is None:
            assert self._reopen is not None, "only what can be opened again is ever given up"
            file = self._reopen()
            # What it holds was never read, so the leases in memory are the truth and these rows are not.
            for lease in read_recovery(file).leases:
                self._pending.leases.setdefault(lease.lease_id, None)
            self._file = file
            self._fresh_files += 1
        return self._file


class MemoryJournal:
    """The same without a file: a restart forgets everything, unless the object is handed on (tests)."""

    failure = ""
    fresh_files = 0

    def __init__(self) -> None:
        self._leases: dict[LeaseId, Lease] = {}
        self._drains: dict[EngineId, bool] = {}
        self._engines: dict[EngineId, str] = {}

    def load(self) -> Recovery:
        """Everything that was submitted so far."""
        draining = tuple(sorted(engine_id for engine_id, on in self._drains.items() if on))
        engines = tuple(self._engines[engine_id] for engine_id in sorted(self._engines))
        return Recovery(tuple(self._leases[lease_id] for lease_id in sorted(self._leases)), draining, engines)

    def submit(self, changes: Sequence[Change]) -> Future[None]:
        """Remember the changes; the future has ended already."""
        for change in changes:
            match change:
                case LeaseStored(lease=lease):
                    self._leases[lease.lease_id] = lease
                case LeaseDropped(lease=lease):
                    self._leases.pop(lease.lease_id, None)
                case DrainFlag(engine_id=engine_id, draining=draining):
                    self._drains[engine_id] = draining
                case EngineRow(engine_id=engine_id, row=None):
                    self._engines.pop(engine_id, None)
                case EngineRow(engine_id=engine_id, row=str(row)):
                    self._engines[engine_id] = row
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def candidates(self, lease_id: LeaseId) -> Future[str | None]:  # noqa: ARG002  # the protocol's
        """Nothing: what it gave back was whole."""
        found: Future[str | None] = Future()
        found.set_result(None)
        return found

    def close(self) -> None:
        """Nothing to give back."""

    def abandon(self) -> None:
        """Nothing to lose."""


@dataclass(frozen=True, slots=True)
class _Job:
    changes: tuple[Change, ...]
    done: Future[None]


@dataclass(frozen=True, slots=True)
class _Question:
    lease_id: LeaseId
    found: Future[str | None]


class _Pending:
    """Changes on their way to the file; the last one per lease and engine counts."""

    def __init__(self) -> None:
        self.leases: dict[str, str | None] = {}
        self.candidates: dict[str, str] = {}
        self.drains: dict[str, bool] = {}
        self.engines: dict[str, str | None] = {}

    def __bool__(self) -> bool:
        return bool(self.leases or self.drains or self.engines)

    def add(self, changes: Sequence[Change]) -> None:
        for change in changes:
            match change:
                case LeaseStored(lease=lease, fresh=fresh):
                    self.leases[lease.lease_id] = encode(lease)
                    if fresh and (text := encode_candidates(lease.receipt)) is not None:
                        self.candidates[lease.lease_id] = text
                case LeaseDropped(lease=lease):
                    self.leases[lease.lease_id] = None
                    self.candidates.pop(lease.lease_id, None)
                case DrainFlag(engine_id=engine_id, draining=draining):
                    self.drains[engine_id] = draining
                case EngineRow(engine_id=engine_id, row=row):
                    self.engines[engine_id] = row


def read_recovery(file: RowStore) -> Recovery:
    """Everything in a store, decoded.

    Raises:
        JournalError: it cannot be read or holds rows of an unknown form.
    """
    try:
        with collector_paused():
            leases = tuple([decode(row) for row in file.rows()])
    except ValueError as error:
        raise JournalError(f"journal: holds a row of an unknown form ({error}); move the file away") from error
    draining = tuple(EngineId(engine_id) for engine_id in file.draining())
    return Recovery(leases, draining, tuple(file.engines()))


@contextmanager
def collector_paused() -> Iterator[None]:
    """Reading 100 000 leases makes only long-lived objects: a collection in between finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

"""The SQLite file behind the journal: opening it safely, reading it whole, writing one group of rows.

One row per live lease (a state table, not a log): the file stays as large as the fleet's live leases, recovery is one
read, and nothing is ever compacted. WAL with `synchronous=FULL` keeps every committed row through a crash of the
process, the system or the power. `locking_mode=EXCLUSIVE` keeps a second broker out for as long as this process lives
(https://sqlite.org/pragma.html#pragma_locking_mode).
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

SCHEMA_VERSION = 4
APPLICATION_ID = 0x436F5376
"""`CoSv` in the header of the file says whose it is."""

_SCHEMA = f"""
CREATE TABLE lease (lease_id TEXT PRIMARY KEY, row TEXT NOT NULL, candidates TEXT);
CREATE TABLE drain (engine_id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE engine (engine_id TEXT PRIMARY KEY, row TEXT NOT NULL);
CREATE TABLE proof (block BLOB NOT NULL);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
_APART = f"""
ALTER TABLE lease ADD COLUMN candidates TEXT;
PRAGMA user_version = {SCHEMA_VERSION};
"""
_UPGRADES = {
    1: f"""
CREATE TABLE engine (engine_id TEXT PRIMARY KEY, row TEXT NOT NULL);
CREATE TABLE proof (block BLOB NOT NULL);
{_APART}""",
    2: _APART,
    3: _APART,
}
"""What turns an older format into this one, by its version; older brokers then refuse the file. Rows of those formats
are still read, and written anew by the broker that reads them (see `JournalFile.upgraded`)."""
_STORE_LEASE = """
INSERT INTO lease VALUES (?, ?, ?) ON CONFLICT (lease_id)
DO UPDATE SET row = excluded.row, candidates = coalesce(excluded.candidates, candidates)
"""
"""Not `INSERT OR REPLACE`: that takes the row out and puts it in at the end, index and all, at three times the cost."""
_MOVE_AWAY = "move it away to start with an empty one"
_PROOF_BYTES = 64 * 1024
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT})
_PASSING = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY}) | _DAMAGED


class JournalError(Exception):
    """The journal cannot be opened, read or written; the message says what to do.

    Attributes:
        passing: the disk is at fault and not the configuration, so it is worth serving without a journal until
            somebody repairs it.
        damaged: the file itself is beyond use; only another one helps.
    """

    def __init__(self, message: str, *, passing: bool = False, damaged: bool = False) -> None:
        super().__init__(message)
        self.passing = passing
        self.damaged = damaged


class Fenced(JournalError):  # noqa: N818  # says what happened, like the store's own word
    """Another broker leads, or nobody does: what this one wanted to write was refused."""


NONE: Mapping[str, str] = MappingProxyType({})


class RowStore(Protocol):
    """Where rows are kept; one thread at a time uses it. `JournalError` is what its methods raise."""

    def rows(self) -> Iterable[str]:
        """Every lease's row, in no order and one at a time: what came of one need not wait in memory for the others."""

    def candidates(self, lease_id: str) -> str | None:
        """What was stored of a lease's candidates, if anything."""

    def draining(self) -> Sequence[str]:
        """Ids of the engines that were draining, ordered."""

    def engines(self) -> Sequence[str]:
        """Rows of the engines that no configuration file names, ordered by id."""

    def write(
        self,
        leases: Mapping[str, str | None],
        drains: Mapping[str, bool],
        engines: Mapping[str, str | None],
        candidates: Mapping[str, str] = NONE,
    ) -> None:
        """One durable transaction: rows to store (None: delete), drain flags to set or clear, and candidates.

        Those are of leases in it, stay for as long as the lease's row does, and need not be given again with it.
        """

    def prove(self) -> None:
        """After a failure: show that there is room again for more than the deletion that just went through."""

    def close(self) -> None:
        """Give it back."""


class JournalFile:
    """One open, exclusively locked journal file. Not thread-safe: one thread at a time uses it.

    Attributes:
        upgraded: it was of an older format, and its rows still are.

    Raises:
        JournalError: the file belongs to somebody else, is damaged, read-only, newer, or in use.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.parent.is_dir():
            raise JournalError(f"journal {path}: there is no folder {path.parent}; make it or correct [journal] path")
        if path.is_dir():
            raise JournalError(f"journal {path}: is a folder; name a file in [journal] path")
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=0, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._explained(error) from error
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._db.close()
            raise self._explained(error) from error
        except JournalError:
            self._db.close()
            raise

    def _prepare(self) -> None:
        execute = self._db.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        self._check_owner()
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute("BEGIN EXCLUSIVE")  # takes the lock now, and proves that the file can be written
        script = _SCHEMA if self._is_empty() else _UPGRADES.get(self._version(), "")
        self.upgraded = script not in {"", _SCHEMA}
        for statement in filter(None, map(str.strip, script.split(";"))):
            execute(statement)
        execute("COMMIT")
        verdict = execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise JournalError(
                f"journal {self._path}: is damaged ({verdict}); {_MOVE_AWAY}", passing=True, damaged=True
            )

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _is_empty(self) -> bool:
        return self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None

    def _check_owner(self) -> None:
        owner = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._version()
        if owner == 0 and version == 0 and self._is_empty():
            return
        if owner != APPLICATION_ID:
            raise JournalError(
                f"journal {self._path}: is an SQLite file of another program; name another file in [journal] path"
            )
        if version != SCHEMA_VERSION and version not in _UPGRADES:
            raise JournalError(
                f"journal {self._path}: was written by another version of ConServe (format {version}, this one reads "
                f"{SCHEMA_VERSION}); start that version, or {_MOVE_AWAY}"
            )

    def _explained(self, error: sqlite3.Error) -> JournalError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        remedies = {
            sqlite3.SQLITE_BUSY: "is in use by another broker; stop it, or give this one its own [journal] path",
            sqlite3.SQLITE_NOTADB: f"is not an SQLite file; {_MOVE_AWAY} or correct [journal] path",
            sqlite3.SQLITE_CORRUPT: f"is damaged; {_MOVE_AWAY}",
            sqlite3.SQLITE_READONLY: "cannot be written; make the file and its folder writable for the broker's user",
            sqlite3.SQLITE_CANTOPEN: "cannot be opened; make the file and its folder writable for the broker's user",
            sqlite3.SQLITE_PERM: "cannot be opened; make the file and its folder writable for the broker's user",
            sqlite3.SQLITE_FULL: "the disk is full; free some space",
            sqlite3.SQLITE_IOERR: "cannot be written (disk full, over its quota, or failing); free some space or check "
            "the disk",
        }
        return JournalError(
            f"journal {self._path}: {remedies.get(code, 'failed; check file and disk')} ({error})",
            passing=code in _PASSING,
            damaged=code in _DAMAGED,
        )

    def rows(self) -> Iterator[str]:
        """Every lease's row, as they lie in the file: in the order of ids, each would be on another page."""
        try:
            for (row,) in self._db.execute("SELECT row FROM lease"):
                yield row
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def candidates(self, lease_id: str) -> str | None:
        """What was stored of a lease's candidates, if anything."""
        found = self._read("SELECT candidates FROM lease WHERE lease_id = ?", lease_id)
        return found[0][0] if found else None

    def draining(self) -> Sequence[str]:
        """Ids of the engines that were draining, ordered."""
        return [engine_id for (engine_id,) in self._read("SELECT engine_id FROM drain ORDER BY engine_id")]

    def engines(self) -> Sequence[str]:
        """Rows of the engines that no configuration file names, ordered by id."""
        return [row for (row,) in self._read("SELECT row FROM engine ORDER BY engine_id")]

    def _read(self, query: str, *values: str) -> list[tuple[str]]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def write(
        self,
        leases: Mapping[str, str | None],
        drains: Mapping[str, bool],
        engines: Mapping[str, str | None],
        candidates: Mapping[str, str] = NONE,
    ) -> None:
        """See `RowStore.write`.

        Raises:
            JournalError: nothing of it was written.
        """
        stored = [(name, row, candidates.get(name)) for name, row in leases.items() if row is not None]
        statements: tuple[tuple[str, Sequence[tuple[str | None, ...]]], ...] = (
            (_STORE_LEASE, stored),
            ("DELETE FROM lease WHERE lease_id = ?", _dropped(leases)),
            ("INSERT OR REPLACE INTO engine VALUES (?, ?)", _stored(engines)),
            ("DELETE FROM engine WHERE engine_id = ?", _dropped(engines)),
            ("INSERT OR IGNORE INTO drain VALUES (?)", [(engine,) for engine, on in drains.items() if on]),
            ("DELETE FROM drain WHERE engine_id = ?", [(engine,) for engine, on in drains.items() if not on]),
        )
        with self._transaction():
            for statement, rows in statements:
                if rows:  # a statement without rows takes a quarter of the time of a small group
                    self._db.executemany(statement, rows)

    def prove(self) -> None:
        """Write a block and take it away again.

        Raises:
            JournalError: there is no room for it.
        """
        with self._transaction():
            self._db.execute("INSERT INTO proof VALUES (zeroblob(?))", (_PROOF_BYTES,))
        with self._transaction():
            self._db.execute("DELETE FROM proof")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        execute = self._db.execute
        try:
            execute("BEGIN IMMEDIATE")
            yield
            execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # the first error is the one to report
                    execute("ROLLBACK")
            raise self._explained(error) from error

    def close(self) -> None:
        """Give the file back; the WAL is folded into it."""
        self._db.close()


def _stored(rows: Mapping[str, str | None]) -> list[tuple[str, str]]:
    return [(name, row) for name, row in rows.items() if row is not None]


def _dropped(rows: Mapping[str, str | None]) -> list[tuple[str]]:
    return [(name,) for name, row in rows.items() if row is None]

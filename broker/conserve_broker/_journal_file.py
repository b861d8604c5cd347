"""The SQLite file behind the journal: opening it safely, reading it whole, writing one group of rows.

One row per live lease (a state table, not a log): the file stays as large as the fleet's live leases, recovery is one
read, and nothing is ever compacted. WAL with `synchronous=FULL` keeps every committed row through a crash of the
process, the system or the power. `locking_mode=EXCLUSIVE` keeps a second broker out for as long as this process lives
(https://sqlite.org/pragma.html#pragma_locking_mode).
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

SCHEMA_VERSION = 2
APPLICATION_ID = 0x436F5376
"""`CoSv` in the header of the file says whose it is."""

_SCHEMA = f"""
CREATE TABLE lease (lease_id TEXT PRIMARY KEY, row TEXT NOT NULL);
CREATE TABLE drain (engine_id TEXT PRIMARY KEY) WITHOUT ROWID;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
_MOVE_AWAY = "move it away to start with an empty one"


class JournalError(Exception):
    """The journal cannot be opened, read or written; the message says what to do."""


class JournalFile:
    """One open, exclusively locked journal file. Not thread-safe: one thread at a time uses it.

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
        if self._is_empty():
            for statement in filter(None, map(str.strip, _SCHEMA.split(";"))):
                execute(statement)
        execute("COMMIT")
        verdict = execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise JournalError(f"journal {self._path}: is damaged ({verdict}); {_MOVE_AWAY}")

    def _is_empty(self) -> bool:
        return self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None

    def _check_owner(self) -> None:
        owner = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if owner == 0 and version == 0 and self._is_empty():
            return
        if owner != APPLICATION_ID:
            raise JournalError(
                f"journal {self._path}: is an SQLite file of another program; name another file in [journal] path"
            )
        if version != SCHEMA_VERSION:
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
            sqlite3.SQLITE_IOERR: "the disk reports errors; check it",
        }
        return JournalError(f"journal {self._path}: {remedies.get(code, 'failed; check file and disk')} ({error})")

    def rows(self) -> Sequence[str]:
        """Every lease's row, ordered by id."""
        return [row for (row,) in self._read("SELECT row FROM lease ORDER BY lease_id")]

    def draining(self) -> Sequence[str]:
        """Ids of the engines that were draining, ordered."""
        return [engine_id for (engine_id,) in self._read("SELECT engine_id FROM drain ORDER BY engine_id")]

    def _read(self, query: str) -> list[tuple[str]]:
        try:
            return self._db.execute(query).fetchall()
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def write(self, leases: Mapping[str, str | None], drains: Mapping[str, bool]) -> None:
        """One durable transaction: rows to store (None: delete) and drain flags to set or clear.

        Raises:
            JournalError: nothing of it was written.
        """
        execute, executemany = self._db.execute, self._db.executemany
        stored = [(lease_id, row) for lease_id, row in leases.items() if row is not None]
        dropped = [(lease_id,) for lease_id, row in leases.items() if row is None]
        try:
            execute("BEGIN IMMEDIATE")
            executemany("INSERT OR REPLACE INTO lease VALUES (?, ?)", stored)
            executemany("DELETE FROM lease WHERE lease_id = ?", dropped)
            executemany("INSERT OR IGNORE INTO drain VALUES (?)", [(engine,) for engine, on in drains.items() if on])
            executemany("DELETE FROM drain WHERE engine_id = ?", [(engine,) for engine, on in drains.items() if not on])
            execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # the first error is the one to report
                    execute("ROLLBACK")
            raise self._explained(error) from error

    def close(self) -> None:
        """Give the file back; the WAL is folded into it."""
        self._db.close()

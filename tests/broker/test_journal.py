"""The journal: nothing acknowledged is ever lost, and a file that is not ours is never touched."""

import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_broker._journal_file import JournalFile
from conserve_broker.journal import (
    DrainFlag,
    EngineRow,
    Journal,
    JournalError,
    MemoryJournal,
    Recovery,
    open_journal,
)
from conserve_sdk.core.decisions import LeaseDropped, LeaseStored
from conserve_sdk.core.lease import Lease
from conserve_sdk.core.vocabulary import DropReason

from .journal_writer import LEASE

WRITER = Path(__file__).with_name("journal_writer.py")
BUDGET_S = 30.0


def lease(number: int, **changes: Any) -> Lease:
    return replace(LEASE, lease_id=f"l-{number:05d}", **changes)


def stored(number: int, **changes: Any) -> LeaseStored:
    return LeaseStored(lease=lease(number, **changes))


def dropped(number: int) -> LeaseDropped:
    return LeaseDropped(lease=lease(number), reason=DropReason.RELEASED)


def write(journal: Journal, *changes: Any) -> None:
    journal.submit(changes).result(BUDGET_S)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + BUDGET_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


class TestState:
    def test_what_was_written_is_found_again(self, path: Path) -> None:
        journal = Journal.open(path)
        assert journal.load() == journal.load()
        assert (journal.load().leases, journal.load().draining) == ((), ())
        write(journal, stored(2), stored(1), DrainFlag("d1", True), DrainFlag("d0", True))
        write(journal, stored(1, turns=3), dropped(2), stored(3), DrainFlag("d1", False))
        journal.close()
        again = Journal.open(path)
        recovery = again.load()
        again.close()
        assert recovery.leases == (lease(1, turns=3), lease(3))
        assert recovery.draining == ("d0",)

    def test_the_last_change_of_a_lease_counts_within_one_group(self, journal: Journal, path: Path) -> None:
        write(journal, stored(1), dropped(1), stored(2), stored(2, turns=9), dropped(3))
        journal.close()
        again = Journal.open(path)
        assert again.load().leases == (lease(2, turns=9),)
        again.close()

    def test_many_threads_lose_nothing(self, path: Path) -> None:
        journal = Journal.open(path)

        def work(first: int) -> None:
            for number in range(first, first + 100):
                journal.submit([stored(number)]).result(BUDGET_S)

        threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 800, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        journal.close()
        again = Journal.open(path)
        assert {found.lease_id for found in again.load().leases} == {f"l-{number:05d}" for number in range(800)}
        again.close()

    def test_closing_writes_what_is_queued(self, path: Path) -> None:
        journal = Journal.open(path)
        futures = [journal.submit([stored(number)]) for number in range(50)]
        journal.close()
        assert all(future.exception(0) is None for future in futures)
        again = Journal.open(path)
        assert len(again.load().leases) == 50
        again.close()

    def test_a_closed_journal_says_so(self, journal: Journal) -> None:
        journal.close()
        journal.close()
        with pytest.raises(JournalError, match="is closed"):
            write(journal, stored(1))

    def test_loading_comes_first(self, journal: Journal) -> None:
        write(journal, stored(1))
        with pytest.raises(JournalError, match="before the first submit"):
            journal.load()

    def test_acknowledgements_cannot_be_cancelled(self, journal: Journal) -> None:
        future = journal.submit([stored(1)])
        assert not future.cancel()
        future.result(BUDGET_S)


class Gate:
    """Lets a test hold the writer inside one commit."""

    def __init__(self, file: JournalFile) -> None:
        self.write = file.write
        self.groups: list[int] = []
        self.entered = threading.Event()
        self.open = threading.Event()
        file.write = self  # type: ignore[method-assign, assignment]

    def __call__(self, leases: Any, *others: Any) -> None:
        self.groups.append(len(leases))
        self.entered.set()
        assert self.open.wait(BUDGET_S)
        self.write(leases, *others)


class TestGroups:
    def test_what_queues_during_a_commit_is_the_next_group(self, journal: Journal) -> None:
        gate = Gate(journal._file)
        first = journal.submit([stored(0)])
        assert gate.entered.wait(BUDGET_S)
        futures = [journal.submit([stored(number)]) for number in range(1, 101)]
        assert not first.done()
        gate.open.set()
        for future in [first, *futures]:
            future.result(BUDGET_S)
        assert gate.groups == [1, 100]

    def test_groups_are_bounded(self, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("conserve_broker.journal._GROUP_MAX", 40)
        gate = Gate(journal._file)
        first = journal.submit([stored(0)])
        assert gate.entered.wait(BUDGET_S)
        futures = [journal.submit([stored(number)]) for number in range(1, 101)]
        gate.open.set()
        for future in [first, *futures]:
            future.result(BUDGET_S)
        assert gate.groups == [1, 40, 40, 20]

    def test_abandoning_keeps_what_was_acknowledged_and_nothing_else(self, path: Path) -> None:
        journal = Journal.open(path)
        write(journal, stored(0))
        gate = Gate(journal._file)
        in_flight = journal.submit([stored(1)])
        assert gate.entered.wait(BUDGET_S)
        queued = journal.submit([stored(2)])
        ending = threading.Thread(target=journal.abandon)
        ending.start()
        wait_for(lambda: journal._closed)
        gate.open.set()
        ending.join(BUDGET_S)
        in_flight.result(BUDGET_S)
        with pytest.raises(JournalError, match="abandoned"):
            queued.result(BUDGET_S)
        again = Journal.open(path)
        assert again.load().leases == (lease(0), lease(1))
        again.close()


engine_ids = st.sampled_from(["d0", "d 1", "dé-\U0001f600", 'q"uote', "back\\slash", "", "null", "\x1f"])
changes = st.one_of(
    st.builds(stored, st.integers(0, 4), turns=st.integers(0, 9)),
    st.builds(dropped, st.integers(0, 4)),
    st.builds(DrainFlag, engine_ids, st.booleans()),
    st.builds(EngineRow, engine_ids, st.none() | st.sampled_from(["{}", '{"a": "\\u0000é"}', "é"])),
)


@settings(max_examples=40)
@given(groups=st.lists(st.lists(changes, max_size=6), max_size=6))
def test_file_and_memory_agree_on_any_groups(groups: list[list[Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal, memory = Journal.open(Path(folder) / "leases.db"), MemoryJournal()
        for group in groups:
            write(journal, *group)
            memory.submit(group)
        journal.close()
        again = Journal.open(Path(folder) / "leases.db")
        found = again.load()
        leases = tuple(sorted(found.leases, key=lambda lease: lease.lease_id))
        assert replace(found, leases=leases) == memory.load()
        again.close()


class TestFailure:
    def test_a_full_disk_is_told_and_made_good_for(self, path: Path) -> None:
        journal = Journal.open(path)
        write(journal, stored(1))
        pages = journal._file._db.execute("PRAGMA page_count").fetchone()[0]
        journal._file._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(JournalError, match="the disk is full; free some space"):
            write(journal, *(stored(number) for number in range(2, 500)), DrainFlag("d0", True))
        assert "the disk is full" in journal.failure
        with pytest.raises(JournalError):
            write(journal, dropped(1))
        journal._file._db.execute("PRAGMA max_page_count = 1000000")
        wait_for(lambda: journal.failure == "")  # by itself, without another change
        journal.close()
        again = Journal.open(path)
        recovery = again.load()
        again.close()
        assert [found.lease_id for found in recovery.leases] == [f"l-{number:05d}" for number in range(2, 500)]
        assert recovery.draining == ("d0",)

    def test_a_write_that_fails_half_way_leaves_nothing_behind(self, path: Path) -> None:
        journal = Journal.open(path)
        journal._file._db.execute("DROP TABLE drain")
        with pytest.raises(JournalError, match=r"failed; check file and disk \(no such table: drain\)"):
            write(journal, stored(1), DrainFlag("d0", True))
        assert list(journal._file.rows()) == []
        journal._file._db.execute("CREATE TABLE drain (engine_id TEXT PRIMARY KEY) WITHOUT ROWID")
        wait_for(lambda: journal.failure == "")
        journal.close()
        again = Journal.open(path)
        assert again.load().leases == (lease(1),)
        again.close()

    def test_a_change_that_cannot_be_encoded_hangs_nobody(self, journal: Journal) -> None:
        with pytest.raises(JournalError, match="could not be written and is left out"):
            write(journal, stored(1, turns=object()))
        assert "left out" in journal.failure
        write(journal, stored(2))
        assert journal.failure == ""


def damage(path: Path) -> None:
    """A journal of 2000 leases whose pages hold nonsense."""
    journal = Journal.open(path)
    write(journal, *(stored(number) for number in range(2000)))
    journal.close()
    content = bytearray(path.read_bytes())
    for page in range(2, len(content) // 4096):
        content[page * 4096 : page * 4096 + 512] = b"\xff" * 512
    path.write_bytes(content)


class TestForeignFiles:
    def expect(self, path: Path, message: str) -> None:
        with pytest.raises(JournalError, match=message) as raised:
            Journal.open(path)
        assert str(path) in str(raised.value)

    def test_a_second_broker_is_kept_out(self, journal: Journal, path: Path) -> None:
        self.expect(path, "is in use by another broker; stop it, or give this one its own")
        probe = f"from conserve_broker.journal import *; Journal.open({str(path)!r})"
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=50, check=False)
        assert done.returncode == 1
        assert "is in use by another broker" in done.stderr

    def test_something_else_than_sqlite(self, path: Path) -> None:
        content = b"dear diary, " * 1000
        path.write_bytes(content)
        self.expect(path, "is not an SQLite file; move it away")
        assert path.read_bytes() == content

    def test_the_database_of_another_program(self, path: Path) -> None:
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE songs (title)")
        other.close()
        content = path.read_bytes()
        self.expect(path, "is an SQLite file of another program")
        assert path.read_bytes() == content

    def test_a_newer_format(self, path: Path) -> None:
        Journal.open(path).close()
        newer = sqlite3.connect(path)
        newer.execute("PRAGMA user_version = 5")
        newer.close()
        self.expect(path, r"another version of ConServe \(format 5, this one reads 4\)")

    def test_an_older_format_is_upgraded_in_place(self, path: Path) -> None:
        journal = Journal.open(path)
        write(journal, stored(1))
        journal.close()
        older = sqlite3.connect(path)
        older.executescript("DROP TABLE engine; DROP TABLE proof; ALTER TABLE lease DROP COLUMN candidates;")
        older.execute("PRAGMA user_version = 1")
        older.close()
        journal = Journal.open(path)
        assert journal.load().leases == (lease(1),)
        assert journal.fresh_files == 1  # so that its rows are written anew
        write(journal, EngineRow("e1", "[1]"))
        journal.close()
        again = Journal.open(path)
        assert again.load().engines == ("[1]",)
        assert again.fresh_files == 0
        again.close()

    def test_a_damaged_file(self, path: Path) -> None:
        damage(path)
        journal = Journal.open(path)
        try:
            assert "is damaged" in journal.failure
            assert "move it away" in journal.failure
            assert journal.load() == Recovery()
            with pytest.raises(JournalError, match="is damaged"):
                write(journal, stored(5_000), EngineRow("e1", "[1]"))
            path.rename(path.with_suffix(".broken"))
            wait_for(lambda: journal.failure == "")  # by itself, without another change
            assert journal.fresh_files == 1, "the new file wants everything that lives"
        finally:
            journal.close()
        again = Journal.open(path)
        assert again.load() == Recovery((lease(5_000),), (), ("[1]",))
        again.close()

    def test_rows_that_nobody_read_are_dropped(self, path: Path) -> None:
        """A backup put in the place of a damaged file says what lived once; memory says what lives."""
        backup = path.with_name("backup.db")
        journal = Journal.open(backup)
        write(journal, stored(1), stored(2))
        journal.close()
        damage(path)
        journal = Journal.open(path)
        try:
            assert journal.load() == Recovery()
            with pytest.raises(JournalError):
                write(journal, stored(2, turns=7))
            backup.replace(path)
            wait_for(lambda: journal.failure == "")
        finally:
            journal.close()
        again = Journal.open(path)
        assert again.load().leases == (lease(2, turns=7),)
        again.close()

    def test_damage_that_shows_while_running(self, journal: Journal, path: Path) -> None:
        write(journal, stored(1))

        def damaged(*_: Any) -> None:
            raise JournalError("journal: is damaged", passing=True, damaged=True)

        journal._file.write = damaged  # type: ignore[method-assign, union-attr]
        with pytest.raises(JournalError, match="is damaged"):
            write(journal, stored(2))
        path.unlink()
        wait_for(lambda: journal.failure == "")
        assert journal.fresh_files == 1

    def test_rows_of_an_unknown_form(self, path: Path) -> None:
        Journal.open(path).close()
        other = sqlite3.connect(path)
        other.execute("INSERT INTO lease VALUES ('l', '[1]', NULL)")
        other.commit()
        other.close()
        journal = Journal.open(path)
        with pytest.raises(JournalError, match="holds a row of an unknown form"):
            journal.load()
        journal.close()

    def test_a_table_that_vanished(self, path: Path) -> None:
        Journal.open(path).close()
        other = sqlite3.connect(path)
        other.execute("DROP TABLE drain")
        other.close()
        journal = Journal.open(path)
        with pytest.raises(JournalError, match=r"failed; check file and disk \(no such table: drain\)"):
            journal.load()
        journal.close()

    def test_a_folder_and_a_missing_folder(self, tmp_path: Path) -> None:
        self.expect(tmp_path, "is a folder; name a file")
        self.expect(tmp_path / "none" / "leases.db", "there is no folder")

    def test_a_path_that_cannot_be_a_file(self) -> None:
        self.expect(Path("/proc/leases.db"), "cannot be opened; make the file and its folder writable")

    def test_a_file_that_cannot_be_written(self, path: Path) -> None:
        """As another user, because root may write everything."""
        Journal.open(path).close()
        path.chmod(0o444)
        probe = (
            "import os, sys; from conserve_broker.journal import Journal; os.chdir(sys.argv[1]);"
            "os.getuid() == 0 and os.setuid(65534); sys.exit(Journal.open('leases.db').failure)"
        )
        path.parent.chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", probe, str(path.parent)], capture_output=True, text=True, timeout=50, check=False
        )
        path.parent.chmod(0o755)
        assert done.returncode == 1
        assert "cannot be " in done.stderr
        assert "make the file and its folder writable" in done.stderr


def test_kill_9_loses_nothing_acknowledged(path: Path) -> None:
    """Eight lives of a writer, each killed at another point; the acknowledged state survives all of them."""
    expected: set[int] = set()
    uncertain: set[int] = set()
    first = 0
    for acknowledged in (1, 5, 8, 30, 77, 200, 3, 400):
        with subprocess.Popen(
            [sys.executable, str(WRITER), str(path), str(first)], stdout=subprocess.PIPE, text=True, env=os.environ
        ) as writer:
            assert writer.stdout is not None
            seen = [int(writer.stdout.readline()) for _ in range(acknowledged)]
            writer.kill()
            seen += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        expected |= {number for number in seen if number % 3}
        uncertain |= set(range(seen[-1] + 1, seen[-1] + 9))  # sent, not acknowledged: either is right
        first = seen[-1] + 9
        journal = Journal.open(path)
        found = {lease.turns for lease in journal.load().leases}
        journal.close()
        assert expected - uncertain <= found
        assert found <= expected | uncertain
        assert not {number for number in found if number % 3 == 0}, "a store and its drop are one transaction"


class TestMemory:
    def test_it_remembers_within_the_process(self) -> None:
        journal = MemoryJournal()
        future: Future[None] = journal.submit([stored(2), stored(1), stored(3), dropped(3), DrainFlag("d1", True)])
        assert future.done()
        journal.submit([DrainFlag("d0", True), DrainFlag("d1", False), dropped(9)])
        journal.close()
        journal.abandon()
        assert journal.failure == ""
        assert journal.load().leases == (lease(1), lease(2))
        assert journal.load().draining == ("d0",)

    def test_the_path_chooses(self, path: Path) -> None:
        assert isinstance(open_journal(""), MemoryJournal)
        journal = open_journal(str(path))
        assert isinstance(journal, Journal)
        journal.close()

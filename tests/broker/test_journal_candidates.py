"""What a receipt says of other engines, in the journal: written once, read when somebody asks."""

from dataclasses import replace
from pathlib import Path

import pytest

from conserve_broker._lease_codec import decode, encode, encode_candidates, take_down
from conserve_broker.journal import DrainFlag, Journal, JournalError
from conserve_sdk.core.receipt import CandidateView

from .journal_writer import LEASE
from .test_journal import BUDGET_S, dropped, lease, stored, wait_for, write

WHOLE = replace(
    LEASE.receipt,
    candidates=tuple(CandidateView(f"d{number}", "decoder", "fits", 9, 8, 7, 6, 5, 4) for number in range(2)),
)


def test_they_stay_with_the_row_and_go_with_it(journal: Journal) -> None:
    write(journal, replace(stored(1, receipt=WHOLE), fresh=True), stored(2, receipt=WHOLE))
    write(journal, stored(1, turns=1, receipt=WHOLE))
    receipt = decode(encode(lease(1, receipt=WHOLE))).receipt
    take_down(receipt, journal.candidates(lease(1).lease_id).result(BUDGET_S))
    assert receipt == WHOLE
    assert journal.candidates(lease(2).lease_id).result(BUDGET_S) is None  # was never said to be fresh
    write(journal, dropped(1))
    assert journal.candidates(lease(1).lease_id).result(BUDGET_S) is None


def test_what_failed_is_written_later_with_them(path: Path) -> None:
    journal = Journal.open(path)
    journal._file._db.execute("DROP TABLE drain")
    with pytest.raises(JournalError):
        write(journal, replace(stored(1, receipt=WHOLE), fresh=True), DrainFlag("d0", True))
    with pytest.raises(JournalError):
        write(journal, stored(1, turns=1, receipt=WHOLE))
    journal._file._db.execute("CREATE TABLE drain (engine_id TEXT PRIMARY KEY) WITHOUT ROWID")
    wait_for(lambda: journal.failure == "")
    assert journal.candidates(lease(1).lease_id).result(BUDGET_S) == encode_candidates(WHOLE)
    journal.close()


def test_a_journal_that_cannot_be_read_or_is_closed_has_none(path: Path) -> None:
    journal = Journal.open(path)
    write(journal, replace(stored(1, receipt=WHOLE), fresh=True))
    journal._file._db.execute("ALTER TABLE lease RENAME TO away")
    assert journal.candidates(lease(1).lease_id).result(BUDGET_S) is None
    journal.close()
    assert journal.candidates(lease(1).lease_id).result(BUDGET_S) is None

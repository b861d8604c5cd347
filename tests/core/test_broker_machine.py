"""The broker under arbitrary histories: an oracle checks the ten invariants after every step.

Time is whole milliseconds, and one rule lands exactly on, just before or just after the next deadline: boundaries are
met on purpose, not by luck. A twin whose engines were configured in the opposite order must decide the same.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from conserve_sdk.core import (
    AFFINITY,
    DEFAULT,
    PAPER,
    Broker,
    JournalFollowed,
    LeaseId,
    LeaseRenewed,
    Ms,
    Recovered,
    Tokens,
)
from tests.core.machine import CHOICE, FLEET
from tests.core.machine_clients import ClientRules
from tests.core.machine_engines import EngineRules


class BrokerMachine(ClientRules, EngineRules):
    """Everything that clients, engines, operators and the clock can do."""

    @rule(span_ms=st.integers(0, 400), scraped=st.booleans())
    def wait(self, span_ms: int, scraped: bool) -> None:
        self._at(self.now_ms + span_ms)
        if scraped:
            self._scrape()

    @precondition(lambda self: self.broker.next_deadline_ms() is not None)
    @rule(late_ms=st.sampled_from([-1, 0, 1]), scraped=st.booleans())
    def wait_for_next_deadline(self, late_ms: int, scraped: bool) -> None:
        deadline_ms = self.broker.next_deadline_ms()
        assert deadline_ms is not None
        if scraped:
            self._scrape()
        self._at(max(self.now_ms, deadline_ms + late_ms))

    @precondition(lambda self: self.oracle.pending)
    @rule(pick=CHOICE, late_ms=st.sampled_from([-1, 0, 1]))
    def wait_as_long_as_a_request(self, pick: int, late_ms: int) -> None:
        waiting = list(self.oracle.pending.values())
        self._at(max(self.now_ms, self.oracle.deadline_ms(waiting[pick % len(waiting)]) + late_ms))

    @precondition(lambda self: self.oracle.first)
    @rule(pick=CHOICE, late_ms=st.sampled_from([-1, 0, 1]))
    def renew_around_expiry(self, pick: int, late_ms: int) -> None:
        lease = self._pick(pick, live=True)
        self.now_ms = max(self.now_ms, self.oracle.ends.get(lease.lease_id, 0) + late_ms)
        self._apply(LeaseRenewed(now_ms=Ms(self.now_ms), lease_id=lease.lease_id))

    @rule(
        grace_ms=st.sampled_from([0, 300, 1_500]),
        scraped=st.sampled_from([True, True, False]),
        followed=st.sampled_from([0, 0, 1, 99]),
    )
    def restart(self, grace_ms: int, scraped: bool, followed: int) -> None:
        """Kill the broker and recover from what the journal holds (invariants 7 and 8), or let a standby lead."""
        rows = tuple(self.oracle.rows.values())
        self.broker, self.twin = Broker(self.settings), Broker(self.settings)
        event = Recovered(now_ms=Ms(self.now_ms), leases=rows[followed:], grace_ms=Ms(grace_ms))
        if followed:
            old = tuple(replace(row, ledger_tokens=Tokens(7)) for row in rows[:followed])
            gone = tuple(replace(row, lease_id=LeaseId(f"{row.lease_id}-gone"), epoch=row.epoch - 1) for row in old)
            self.broker.apply(JournalFollowed(now_ms=Ms(0), stored=(*gone, *old)))
            dropped = tuple(row.lease_id for row in gone)
            self.broker.apply(JournalFollowed(now_ms=Ms(self.now_ms), stored=rows[:followed], dropped=dropped))
            for row in rows[:followed]:
                self.twin.apply(JournalFollowed(now_ms=Ms(self.now_ms), stored=(row,)))
        decisions = self.broker.apply(event)
        assert self.twin.apply(replace(event, leases=rows[followed:][::-1])) == decisions
        self.oracle.restart(event, decisions)
        self._configure(FLEET)
        if scraped:
            self.the_books_agree()
            self._scrape()


class PaperMachine(BrokerMachine):
    """Most leases migrate."""

    placement = PAPER


class DefaultMachine(BrokerMachine):
    """The score decides, and a watermark below the capacity."""

    placement = DEFAULT


class AffinityMachine(BrokerMachine):
    """No lease migrates."""

    placement = AFFINITY


# A failing history is shown as found: shrinking it would take longer than a test may.
for _machine in (PaperMachine, DefaultMachine, AffinityMachine):
    _machine.TestCase.settings = settings(
        max_examples=20, stateful_step_count=50, phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False
    )
TestPaper = PaperMachine.TestCase
TestDefault = DefaultMachine.TestCase
TestAffinity = AffinityMachine.TestCase

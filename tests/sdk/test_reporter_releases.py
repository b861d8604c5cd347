"""Leases that the reporter gives back: off the path of every turn, behind their reports, and at most once."""

from __future__ import annotations

import httpx2
import pytest

from conserve_sdk._broker_client import SyncBrokerClient
from conserve_sdk._registry import LeaseRegistry
from conserve_sdk._reporter import Reporter
from conserve_sdk.protocol import TurnStartedReport
from conserve_sdk.testing import FakeClock

from .grants import REF, grant


class Bench:
    """A reporter without a thread, its clock, and what its broker was asked for."""

    def __init__(self) -> None:
        self.clock = FakeClock(start_ms=1_000_000)
        self.asked: list[str] = []
        self.down = False
        client = SyncBrokerClient(
            ["http://broker.invalid"],
            transport=httpx2.MockTransport(self._serve),
            sleep=lambda seconds: None,
            clock=self.clock.monotonic_s,
        )
        self.registry = LeaseRegistry(jitter=lambda: 1.0)
        self.reporter = Reporter(
            client, self.registry, threaded=False, call_budget_ms=1, clock=self.clock.now_ms, window_ms=1_000
        )

    def _serve(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(f"{request.method} {request.url.path}")
        if self.down:
            raise httpx2.ConnectError("down")
        if request.method == "DELETE":
            return httpx2.Response(204)
        return httpx2.Response(200, json={"results": [{"lease_id": "L1", "verdict": "ok", "expires_in_ms": 60_000}]})

    def pump(self) -> int | None:
        return self.reporter.pump(self.clock.now_ms())


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_at_once_where_nothing_is_to_be_reported(bench: Bench) -> None:
    bench.reporter.give_back(grant())
    assert bench.pump() is None
    assert bench.asked == ["DELETE /v1/leases/L1"]
    assert bench.pump() is None
    assert len(bench.asked) == 1


def test_behind_the_reports_of_before_and_not_behind_those_of_after(bench: Bench) -> None:
    bench.reporter.submit(TurnStartedReport(token="token-L1"))
    bench.reporter.give_back(grant())
    looks_again_at_ms = bench.pump()
    assert bench.asked == []
    assert looks_again_at_ms == bench.clock.now_ms() + 1_000
    bench.clock.advance(500)
    bench.reporter.submit(TurnStartedReport(token="token-L1"))
    bench.clock.advance(500)
    bench.pump()
    assert bench.asked == ["POST /v1/reports", "DELETE /v1/leases/L1"]
    bench.reporter.give_back(grant())
    bench.clock.advance(1)
    bench.reporter.submit(TurnStartedReport(token="token-L1"))
    bench.pump()
    assert bench.asked[2:] == ["DELETE /v1/leases/L1"]


def test_a_flush_sends_it_too(bench: Bench) -> None:
    bench.reporter.submit(TurnStartedReport(token="token-L1"))
    bench.reporter.give_back(grant())
    assert bench.reporter.flush()
    assert bench.asked == ["POST /v1/reports", "DELETE /v1/leases/L1"]


def test_one_that_no_broker_takes_is_left_to_its_time(bench: Bench) -> None:
    bench.down = True
    bench.reporter.give_back(grant())
    bench.pump()
    bench.down = False
    tries = len(bench.asked)
    assert tries >= 1
    assert bench.reporter.flush()
    assert len(bench.asked) == tries


def test_it_waits_while_reports_are_held_back_from_a_broker_that_is_down(bench: Bench) -> None:
    bench.down = True
    bench.reporter.submit(TurnStartedReport(token="token-L1"))
    assert not bench.reporter.flush()
    bench.reporter.give_back(grant())
    bench.down = False
    bench.asked.clear()
    bench.pump()
    assert bench.asked == [], "the broker is left alone for a while"
    bench.clock.advance(1_000)
    bench.pump()
    assert bench.asked == ["POST /v1/reports", "DELETE /v1/leases/L1"]


def test_nothing_is_given_back_after_close(bench: Bench) -> None:
    bench.reporter.close()
    bench.reporter.give_back(grant())
    bench.pump()
    assert bench.asked == []


def test_retiring_forgets_an_entry_once_and_never_under_a_turn(bench: Bench) -> None:
    registry, now_ms = bench.registry, bench.clock.now_ms()
    assert registry.retire(REF, now_ms=now_ms) is None
    registry.store(REF, grant(), sent_at_ms=now_ms)
    registry.begin_turn(REF, arrived_at_ms=now_ms)
    assert registry.retire(REF, now_ms=now_ms) is None
    registry.end_turn(REF, now_ms=now_ms, loop_goes_on=True)
    assert registry.next_renewal_ms(now_ms=now_ms) is not None
    assert registry.retire(REF, now_ms=now_ms) == grant()
    assert registry.next_renewal_ms(now_ms=now_ms) is None
    assert registry.retire(REF, now_ms=now_ms) is None


def test_a_retired_lease_that_is_over_needs_no_release(bench: Bench) -> None:
    now_ms = bench.clock.now_ms()
    bench.registry.store(REF, grant(), sent_at_ms=now_ms)
    assert bench.registry.retire(REF, now_ms=now_ms + 86_400_000) is None

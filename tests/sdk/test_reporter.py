"""Reports and renewals: step by step without a thread, then the thread itself, a fork and the exit of the process."""

import gc
import json
import logging
import subprocess
import sys
import textwrap
import threading
import weakref

import httpx2
import pytest

from conserve_sdk import _reporter
from conserve_sdk._broker_client import SyncBrokerClient
from conserve_sdk._registry import LeaseRef, LeaseRegistry
from conserve_sdk._reporter import Reporter
from conserve_sdk.core.units import ConversationId, LineageId, ModelName
from conserve_sdk.errors import LeaseClosed
from conserve_sdk.protocol import (
    EngineFailureReport,
    LeaseRequest,
    ReportBatch,
    TurnFinishedReport,
    TurnStartedReport,
)
from conserve_sdk.testing import FakeClock, InMemoryBroker

from .grants import REF, grant


def started(token: str = "token-L1", **fields) -> TurnStartedReport:
    return TurnStartedReport(token=token, **fields)


def failure(token: str = "token-L1") -> EngineFailureReport:
    return EngineFailureReport(token=token, engine_id="d0", incarnation="1", phase="decode")


class Scripted:
    """Answers each report and renewal with `ok`, until told otherwise; remembers the sizes of the batches."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.tokens: list[str] = []
        self.down: Exception | int | None = None
        self.verdict: dict = {"verdict": "ok", "expires_in_ms": 60_000}
        self.answered = threading.Event()
        self.takes = lambda: None

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        entries = body.get("reports") or [{"token": token} for token in body["tokens"]]
        self.calls.append((request.url.path, len(entries)))
        self.answered.set()
        self.takes()
        if isinstance(self.down, Exception):
            raise self.down
        if self.down:
            return httpx2.Response(self.down, json={"title": "t", "status": self.down, "detail": "d", "code": "x"})
        self.tokens += [entry["token"] for entry in entries]
        results = [{"lease_id": entry["token"].removeprefix("token-"), **self.verdict} for entry in entries]
        return httpx2.Response(200, json={"results": results})


class Bench:
    """A reporter without a thread, its clock and its broker."""

    def __init__(self, **options) -> None:
        self.clock = FakeClock(start_ms=1_000_000)
        self.broker = Scripted()
        self.registry = LeaseRegistry(jitter=lambda: 1.0)
        client = SyncBrokerClient(
            ["http://broker.invalid"],
            transport=httpx2.MockTransport(self.broker),
            sleep=lambda seconds: None,  # attempts of one call cost no time here
            clock=self.clock.monotonic_s,
        )
        options = {"threaded": False, "call_budget_ms": 1, "clock": self.clock.now_ms, **options}
        self.reporter = Reporter(client, self.registry, **options)

    def use(self, lease_id: str = "L1", ref: LeaseRef = REF, **changes) -> None:
        self.registry.store(ref, grant(lease_id, **changes), sent_at_ms=self.clock.now_ms())
        self.registry.begin_turn(ref, arrived_at_ms=self.clock.now_ms())

    def pump(self, after_ms: int = 0) -> int | None:
        """Let time pass, do what is due; return in how many ms to look again."""
        now_ms = self.clock.advance(after_ms)
        wake_at_ms = self.reporter.pump(now_ms)
        return None if wake_at_ms is None else wake_at_ms - now_ms


@pytest.fixture
def bench() -> Bench:
    return Bench()


class TestReports:
    def test_nothing_to_do_sleeps(self, bench: Bench) -> None:
        assert bench.pump() is None
        assert bench.broker.calls == []

    def test_wait_for_company_one_window_long(self, bench: Bench) -> None:
        bench.reporter.submit(started())
        assert bench.pump() == 1_000
        bench.clock.advance(400)
        bench.reporter.submit(started())
        assert bench.pump(599) == 1
        assert bench.broker.calls == []
        assert bench.pump(1) is None
        assert bench.broker.calls == [("/v1/reports", 2)]

    def test_a_row_of_reports_wakes_the_thread_once(self, bench: Bench) -> None:
        reporter = bench.reporter
        reporter.submit(started())
        assert reporter._noticed
        bench.clock.advance(1_000)
        assert reporter._look() == bench.clock.now_ms() + 1_000  # a batch went: the next look is regular
        bench.clock.advance(900)
        reporter.submit(started())
        assert not reporter._noticed
        bench.clock.advance(100)
        reporter._look()  # what is queued goes with it, young as it is
        assert bench.broker.calls == [("/v1/reports", 1), ("/v1/reports", 1)]
        bench.clock.advance(1_000)
        assert reporter._look() is None  # nothing came: no more regular looks
        reporter.submit(started())
        assert reporter._noticed

    def test_a_failed_engine_does_not_wait_for_the_regular_look(self, bench: Bench) -> None:
        bench.reporter.submit(started())
        bench.clock.advance(1_000)
        bench.reporter._look()
        bench.reporter.submit(failure())
        assert bench.reporter._noticed
        bench.reporter._look()
        assert bench.broker.calls == [("/v1/reports", 1), ("/v1/reports", 1)]

    def test_a_full_batch_goes_at_once_and_the_rest_with_it(self) -> None:
        bench = Bench(batch_max=3)
        for number in range(7):
            bench.reporter.submit(started(f"token-{number}"))
        assert bench.pump() is None
        assert bench.broker.calls == [("/v1/reports", 3), ("/v1/reports", 3), ("/v1/reports", 1)]
        assert bench.broker.tokens == [f"token-{number}" for number in range(7)]

    def test_a_failed_engine_is_news_that_does_not_wait(self, bench: Bench) -> None:
        bench.reporter.submit(started())
        bench.reporter.submit(failure())
        assert bench.pump() is None
        assert bench.broker.calls == [("/v1/reports", 2)]
        bench.reporter.submit(started())
        assert bench.pump() == 1_000  # only that once

    def test_verdicts_reach_the_registry(self, bench: Bench) -> None:
        bench.use()
        bench.reporter.submit(started())
        bench.broker.verdict = {"verdict": "ok", "expires_in_ms": 90_000, "token": "fresh"}
        bench.pump(1_000)
        view = bench.registry.view(REF, now_ms=bench.clock.now_ms() + 89_999)
        assert (view.live, view.grant.token) == (True, "fresh")
        bench.reporter.submit(started("fresh"))
        bench.broker.verdict = {"verdict": "bad_token", "lease_id": ""}
        bench.pump(1_000)
        assert bench.registry.view(REF, now_ms=bench.clock.now_ms()).lost == "bad_token"

    def test_a_report_counts_as_a_renewal(self, bench: Bench) -> None:
        bench.use()
        bench.clock.advance(19_500)
        bench.reporter.submit(started())
        assert bench.pump(1_000) == 20_000
        assert bench.broker.calls == [("/v1/reports", 1)]


class TestBrokerDown:
    def test_reports_wait_with_growing_pauses_and_keep_their_order(self, bench: Bench, caplog) -> None:
        bench.broker.down = httpx2.ConnectError("refused")
        for number in range(3):
            bench.reporter.submit(started(f"token-{number}"))
        waits = [bench.pump(after_ms) for after_ms in (1_000, 500, 1_000, 2_000, 4_000)]
        assert waits == [500, 1_000, 2_000, 4_000, 8_000]
        assert [record.levelno for record in caplog.records] == [logging.WARNING]  # told once, not every time
        bench.broker.down = None
        assert bench.pump(8_000) is None
        assert bench.broker.tokens == ["token-0", "token-1", "token-2"]
        assert bench.reporter.dropped == 0

    def test_pauses_are_bounded_and_start_small_again(self, bench: Bench) -> None:
        bench.broker.down = 503
        bench.reporter.submit(started())
        waits = [bench.pump(10_000) for _ in range(8)]
        assert waits[-2:] == [10_000, 10_000]
        bench.broker.down = None
        bench.pump(10_000)
        bench.broker.down = 503
        bench.reporter.submit(started())
        assert bench.pump(1_000) == 500

    def test_the_oldest_are_dropped_and_counted(self) -> None:
        bench = Bench(queue_max=3, batch_max=2)
        bench.broker.down = 503
        for number in range(4):
            bench.reporter.submit(started(f"token-{number}"))
        bench.pump()
        for number in range(4, 6):
            bench.reporter.submit(started(f"token-{number}"))
        assert bench.reporter.dropped == 3
        bench.broker.down = None
        bench.pump(1_000)
        assert bench.broker.tokens == ["token-3", "token-4", "token-5"]

    def test_a_batch_the_broker_never_takes_does_not_block_the_others(self, caplog) -> None:
        bench = Bench(batch_max=1)
        bench.broker.down = 422
        bench.reporter.submit(started("token-poison"))
        bench.pump()
        assert bench.reporter.dropped == 1
        assert "reports_dropped count=1" in caplog.text
        bench.broker.down = None
        bench.reporter.submit(started("token-good"))
        bench.pump()
        assert bench.broker.tokens == ["token-good"]

    def test_leases_live_on_and_are_renewed_when_it_is_back(self, bench: Bench) -> None:
        bench.use()
        bench.broker.down = 503
        assert bench.pump(20_000) == 500
        assert bench.pump(100) == 400  # not before the pause is over
        assert bench.broker.calls == [("/v1/renewals", 1)]
        bench.broker.down = None
        assert bench.pump(400) == 20_000
        assert bench.registry.view(REF, now_ms=bench.clock.now_ms() + 59_999).live


class TestRenewals:
    def test_are_planned_for_leases_in_use(self, bench: Bench) -> None:
        bench.use()
        assert bench.pump() == 20_000
        assert bench.pump(20_000) == 20_000
        assert bench.broker.calls == [("/v1/renewals", 1)]
        bench.registry.end_turn(REF, now_ms=bench.clock.now_ms(), loop_goes_on=False)
        assert bench.pump(20_000) is None
        assert len(bench.broker.calls) == 1

    def test_go_in_batches_the_protocol_allows(self, bench: Bench) -> None:
        for number in range(501):
            name = str(number)
            bench.use(name, LeaseRef(ConversationId(name), LineageId("l"), ModelName("m")))
        assert bench.pump(20_000) == 20_000
        assert bench.broker.calls == [("/v1/renewals", 500), ("/v1/renewals", 1)]

    def test_are_not_kept_waiting_by_a_long_queue_at_a_slow_broker(self) -> None:
        bench = Bench(batch_max=100, call_budget_ms=5_000)
        bench.use()
        bench.broker.takes = lambda: bench.clock.advance(4_000)
        for number in range(2_000):
            bench.reporter.submit(started(f"token-other-{number}"))
        bench.pump()
        renewals = [place for place, (path, _) in enumerate(bench.broker.calls) if path == "/v1/renewals"]
        assert renewals[0] == 5  # after 20 s
        assert len(renewals) >= 3
        assert bench.registry.view(REF, now_ms=bench.clock.now_ms()).live  # 80 s later, with a life of 60 s
        assert sum(count for path, count in bench.broker.calls if path == "/v1/reports") == 2_000

    def test_a_loss_is_fed_back_and_not_renewed_again(self, bench: Bench) -> None:
        bench.use()
        bench.broker.verdict = {"verdict": "engine_lost"}
        assert bench.pump(20_000) is None
        assert bench.registry.view(REF, now_ms=bench.clock.now_ms()).lost == "engine_lost"


class TestFlushAndClose:
    def test_flush_sends_before_the_window_is_over(self, bench: Bench) -> None:
        bench.reporter.submit(started())
        assert bench.reporter.flush()
        assert bench.broker.calls == [("/v1/reports", 1)]
        assert bench.reporter.flush()  # nothing left: nothing to do

    def test_flush_does_not_wait_for_a_pause_and_tells_when_it_failed(self, bench: Bench) -> None:
        bench.broker.down = 503
        bench.reporter.submit(started())
        bench.pump(1_000)
        assert not bench.reporter.flush()
        bench.broker.down = None
        assert bench.reporter.flush()
        assert bench.broker.tokens == ["token-L1"]

    def test_close_flushes_and_then_takes_no_more(self, bench: Bench) -> None:
        bench.reporter.submit(started())
        bench.reporter.close()
        bench.reporter.close()
        bench.reporter.wake()
        assert bench.broker.calls == [("/v1/reports", 1)]
        with pytest.raises(LeaseClosed):
            bench.reporter.submit(started())

    def test_close_counts_what_the_broker_did_not_take(self, bench: Bench, caplog) -> None:
        bench.broker.down = 503
        bench.reporter.submit(started())
        bench.reporter.close()
        assert bench.reporter.dropped == 1
        assert "reports_dropped count=1" in caplog.text


class TestAgainstTheRealCore:
    def test_exact_tokens_reach_the_ledger_and_a_restart_is_noticed(self) -> None:
        broker = InMemoryBroker()
        client = SyncBrokerClient([broker.url], transport=broker)
        registry = LeaseRegistry()
        reporter = Reporter(client, registry, threaded=False, clock=broker.clock.now_ms)
        request = LeaseRequest(conversation_id="c", lineage="l", model="test-model", first_turn_input_tokens=500)
        lease = client.acquire(request, budget_ms=5_000)
        registry.store(REF, lease, sent_at_ms=broker.clock.now_ms())
        reporter.submit(TurnFinishedReport(token=lease.token, prompt_tokens=700, completion_tokens=42))
        assert reporter.flush()
        assert broker.core.lease(lease.lease_id).ledger_tokens == 742
        broker.restart_engine(lease.decoder.engine_id)
        reporter.submit(TurnStartedReport(token=lease.token))
        assert reporter.flush()
        view = registry.view(REF, now_ms=broker.clock.now_ms())
        assert not view.live
        assert view.lost in ("engine_lost", "unknown")

    def test_a_broker_that_lost_its_state_takes_the_lease_back(self) -> None:
        broker = InMemoryBroker()
        client = SyncBrokerClient([broker.url], transport=broker)
        registry = LeaseRegistry()
        reporter = Reporter(client, registry, threaded=False, clock=broker.clock.now_ms)
        request = LeaseRequest(conversation_id="c", lineage="l", model="test-model", first_turn_input_tokens=500)
        lease = client.acquire(request, budget_ms=5_000)
        registry.store(REF, lease, sent_at_ms=broker.clock.now_ms())
        registry.begin_turn(REF, arrived_at_ms=broker.clock.now_ms())
        broker.restart(lose_state=True)
        broker.clock.advance(lease.renew_after_ms)
        reporter.pump(broker.clock.now_ms())
        assert registry.view(REF, now_ms=broker.clock.now_ms()).live
        assert broker.core.lease(lease.lease_id) is not None


def reporter_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "conserve-reporter"]


@pytest.fixture
def threaded():
    """A reporter with its thread, on the real clock; its window never ends by itself within a test."""
    before = reporter_threads()
    bench = Bench(threaded=True, window_ms=3_600_000, call_budget_ms=5_000, clock=_reporter.monotonic_ms)
    yield bench
    bench.reporter.close()
    assert reporter_threads() == before


class TestThread:
    def test_starts_with_the_first_report_and_ends_at_close(self, threaded: Bench) -> None:
        before = len(reporter_threads())
        threaded.reporter.submit(started())
        assert len(reporter_threads()) == before + 1
        assert threaded.broker.calls == []  # it waits for company
        assert threaded.reporter.flush(timeout_s=30)
        assert threaded.broker.calls == [("/v1/reports", 1)]

    def test_urgent_news_wake_it(self, threaded: Bench) -> None:
        threaded.reporter.submit(started())
        threaded.reporter.submit(failure())
        assert threaded.broker.answered.wait(timeout=30)
        assert threaded.reporter.flush(timeout_s=30)
        assert threaded.broker.tokens == ["token-L1"] * 2

    def test_renews_without_any_report(self, threaded: Bench) -> None:
        now_ms = _reporter.monotonic_ms()
        threaded.registry.store(REF, grant(), sent_at_ms=now_ms - 30_000)  # overdue
        threaded.registry.begin_turn(REF, arrived_at_ms=now_ms)
        threaded.reporter.wake()
        assert threaded.broker.answered.wait(timeout=30)
        assert threaded.broker.calls[0] == ("/v1/renewals", 1)

    def test_reports_of_many_threads_all_arrive(self, threaded: Bench) -> None:
        def talk(name: str) -> None:
            for number in range(100):
                threaded.reporter.submit(started(f"token-{name}.{number}"))

        threads = [threading.Thread(target=talk, args=(str(i),)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert threaded.reporter.flush(timeout_s=30)
        assert sorted(threaded.broker.tokens) == sorted(f"token-{i}.{n}" for i in range(8) for n in range(100))
        for i in range(8):  # in the order of each thread
            mine = [int(t.partition(".")[2]) for t in threaded.broker.tokens if t.startswith(f"token-{i}.")]
            assert mine == list(range(100))

    def test_a_broker_that_hangs_blocks_no_turn(self) -> None:
        bench = Bench(threaded=True, batch_max=10, queue_max=50, call_budget_ms=60_000, clock=_reporter.monotonic_ms)
        hangs, goes_on = threading.Event(), threading.Event()

        def hang() -> None:
            hangs.set()
            goes_on.wait(100)

        bench.broker.takes = hang
        try:
            for number in range(10):
                bench.reporter.submit(started(f"token-{number}"))
            assert hangs.wait(30)
            for number in range(10, 110):  # the first ten are on their way
                bench.reporter.submit(started(f"token-{number}"))
            assert not goes_on.is_set()
            assert bench.reporter.dropped == 50  # the oldest of those that wait
        finally:
            goes_on.set()
        assert bench.reporter.flush(timeout_s=60)
        assert bench.broker.tokens == [f"token-{number}" for number in (*range(10), *range(60, 110))]
        bench.reporter.close()

    def test_flush_ends_when_the_broker_will_never_take_it(self, threaded: Bench) -> None:
        threaded.broker.down = 403
        threaded.reporter.submit(started())
        assert threaded.reporter.flush(timeout_s=30)
        assert threaded.reporter.dropped == 1

    def test_a_mistake_of_ours_does_not_end_it(self, threaded: Bench, monkeypatch, caplog) -> None:
        broken = threading.Event()

        def explode(now_ms: int) -> int | None:
            monkeypatch.undo()
            broken.set()
            raise RuntimeError("planted")

        monkeypatch.setattr(threaded.reporter, "pump", explode)
        threaded.reporter.submit(started())
        assert broken.wait(timeout=30)
        assert threaded.reporter.flush(timeout_s=30)
        assert "reporter_failed" in caplog.text

    def test_with_nothing_to_do_it_ends_and_lets_go_of_its_reporter(self, monkeypatch) -> None:
        monkeypatch.setattr(_reporter, "IDLE_EXIT_S", 0.0)
        bench = Bench(threaded=True, window_ms=0, call_budget_ms=5_000, clock=_reporter.monotonic_ms)
        bench.reporter.submit(started())
        assert bench.reporter.flush(timeout_s=30)
        for thread in reporter_threads():
            thread.join(timeout=30)
        bench.broker.answered.clear()
        bench.reporter.submit(started())  # starts another one
        assert bench.broker.answered.wait(timeout=30)
        for thread in reporter_threads():
            thread.join(timeout=30)
        gone = weakref.ref(bench.reporter)
        del bench
        gc.collect()
        assert gone() is None

    def test_a_forked_child_reports_with_a_thread_of_its_own(self, threaded: Bench, fork_and_wait) -> None:
        threaded.reporter.submit(started("token-parent"))

        def child() -> None:
            assert not reporter_threads()
            threaded.reporter.submit(started("token-child"))
            assert threaded.reporter.flush(timeout_s=30)
            assert threaded.broker.tokens == ["token-child"]
            threaded.reporter.close()

        with threaded.reporter._changed:  # as if another thread were inside
            assert fork_and_wait(child) == 0
        assert threaded.reporter.flush(timeout_s=30)
        assert threaded.broker.tokens == ["token-parent"]


def test_the_end_of_the_process_sends_what_is_left_and_does_not_hang() -> None:
    program = textwrap.dedent("""
        import httpx2
        from conserve_sdk._broker_client import SyncBrokerClient
        from conserve_sdk._registry import LeaseRegistry
        from conserve_sdk._reporter import Reporter
        from conserve_sdk.protocol import TurnStartedReport

        def answer(request):
            print(request.url.path, flush=True)
            return httpx2.Response(200, json={"results": [{"lease_id": "L1", "verdict": "ok"}]})

        client = SyncBrokerClient(["http://broker.invalid"], transport=httpx2.MockTransport(answer))
        reporter = Reporter(client, LeaseRegistry(), window_ms=3_600_000)
        reporter.submit(TurnStartedReport(token="t"))
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == "/v1/reports\n"
    assert done.stderr == ""


def test_a_batch_is_never_larger_than_the_protocol_allows() -> None:
    bench = Bench(batch_max=100_000)
    for _ in range(501):
        bench.reporter.submit(started())
    bench.pump(1_000)
    assert bench.broker.calls == [("/v1/reports", 500), ("/v1/reports", 1)]
    ReportBatch(reports=(started(),) * 500)

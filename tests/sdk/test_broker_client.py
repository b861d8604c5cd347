"""Calls to the broker: every rule in both colours, against the real core; time, and several brokers."""

import json

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.errors import (
    BrokerUnavailable,
    ConfigError,
    LeaseRefused,
)
from conserve_sdk.protocol import (
    RenewalBatch,
    ReportBatch,
    SupersedeRequest,
    TurnFinishedReport,
    TurnStartedReport,
)
from conserve_sdk.testing import InMemoryBroker, small_fleet

from .callers import REQUEST, Colour, Script, granted, problem


class TestAgainstTheRealCore:
    def test_a_lease_from_grant_to_release(self, colour: Colour) -> None:
        broker = InMemoryBroker(clock=colour.clock)
        client = colour.client(broker)
        lease = colour.run(client.acquire(REQUEST, budget_ms=5_000))
        assert (lease.conversation_id, lease.reused) == ("c", False)
        again = colour.run(client.acquire(REQUEST, budget_ms=5_000))
        assert (again.lease_id, again.reused) == (lease.lease_id, True)
        reports = (
            TurnStartedReport(token=lease.token, input_tokens=1_000),
            TurnFinishedReport(token=lease.token, prompt_tokens=1_000, completion_tokens=24),
        )
        answer = colour.run(client.report(ReportBatch(reports=reports)))
        assert [status.verdict for status in answer.results] == ["ok", "ok"]
        answer = colour.run(client.renew(RenewalBatch(tokens=(lease.token,))))
        assert [status.lease_id for status in answer.results] == [lease.lease_id]
        assert 0 < colour.run(client.park(lease.lease_id, lease.token)).expires_in_ms < lease.ttl_ms
        colour.run(client.release(lease.lease_id, lease.token))
        colour.run(client.release(lease.lease_id, lease.token))  # gone already: no error
        assert broker.core.lease_count() == 0

    def test_supersede_moves_to_another_decoder(self, colour: Colour) -> None:
        broker = InMemoryBroker(clock=colour.clock)
        client = colour.client(broker)
        first = colour.run(client.acquire(REQUEST, budget_ms=5_000))
        failed = first.decoder.engine_id
        request = SupersedeRequest(token=first.token, epoch=1, reason="connect refused", failed_engine_id=failed)
        second = colour.run(client.supersede(first.lease_id, request, budget_ms=5_000))
        assert (second.epoch, second.supersedes) == (2, first.lease_id)
        assert second.decoder.engine_id != failed

    def test_a_refusal_names_its_reason(self, colour: Colour) -> None:
        broker = InMemoryBroker(clock=colour.clock)
        with pytest.raises(LeaseRefused) as caught:
            colour.run(colour.client(broker).acquire(REQUEST.model_copy(update={"model": "other"}), budget_ms=5_000))
        assert (caught.value.reason, caught.value.conversation_id) == ("unknown_model", "c")
        assert caught.value.broker_url == "http://broker.invalid"
        assert len(broker.exchanges) == 1  # trying again would not help

    def test_waits_for_room_within_its_patience(self, colour: Colour) -> None:
        broker = InMemoryBroker(small_fleet(decoders=1, prefillers=0), clock=colour.clock)
        client = colour.client(broker)
        big = {"first_turn_input_tokens": 30_000, "wait_ms": 90_000}
        for name in "abc":
            colour.run(client.acquire(REQUEST.model_copy(update={**big, "conversation_id": name}), budget_ms=95_000))
        assert broker.core.counters.expired > 0  # the third had to wait until another one's time was over

    def test_is_refused_when_its_patience_is_over(self, colour: Colour) -> None:
        broker = InMemoryBroker(small_fleet(decoders=1, prefillers=0), clock=colour.clock)
        client = colour.client(broker)
        big = REQUEST.model_copy(update={"first_turn_input_tokens": 30_000, "wait_ms": 5_000})
        started = colour.clock.now_ms()
        for name in "ab":
            colour.run(client.acquire(big.model_copy(update={"conversation_id": name}), budget_ms=10_000))
        with pytest.raises(LeaseRefused) as caught:
            colour.run(client.acquire(big, budget_ms=10_000))
        assert caught.value.reason == "no_capacity"
        assert colour.clock.now_ms() - started <= 10_000

    def test_a_broker_that_comes_back_within_the_budget_is_found(self, colour: Colour) -> None:
        broker = InMemoryBroker(clock=colour.clock)
        broker.stop()
        colour.clock.on_advance(lambda: broker.start() if not broker._running else None)
        lease = colour.run(colour.client(broker).acquire(REQUEST, budget_ms=5_000))
        assert lease.epoch == 1
        assert colour.sleeps == [0.1]

    def test_parking_a_dead_lease_tells_so(self, colour: Colour) -> None:
        broker = InMemoryBroker(clock=colour.clock, settings=BrokerSettings())
        client = colour.client(broker)
        lease = colour.run(client.acquire(REQUEST, budget_ms=5_000))
        colour.run(client.release(lease.lease_id, lease.token))
        assert colour.run(client.park(lease.lease_id, lease.token)).verdict == "unknown"


class TestBudget:
    def test_gives_up_when_the_budget_is_spent(self, colour: Colour) -> None:
        script = Script(httpx2.ConnectError("refused"), clock=colour.clock, takes_ms=10)
        started = colour.clock.now_ms()
        with pytest.raises(BrokerUnavailable, match="is it running") as caught:
            colour.run(colour.client(httpx2.MockTransport(script)).acquire(REQUEST, budget_ms=3_000))
        assert colour.clock.now_ms() - started <= 3_000
        assert isinstance(caught.value.__cause__, httpx2.ConnectError)
        assert colour.sleeps == [0.1, 0.2, 0.4, 0.8]

    def test_silence_is_not_waited_for_as_admission_is(self, colour: Colour) -> None:
        script = Script(httpx2.ConnectError("refused"), clock=colour.clock, takes_ms=10)
        started = colour.clock.now_ms()
        patient = REQUEST.model_copy(update={"wait_ms": 30_000})
        with pytest.raises(BrokerUnavailable):
            colour.run(colour.client(httpx2.MockTransport(script)).acquire(patient, budget_ms=35_000))
        assert 2_000 < colour.clock.now_ms() - started <= 5_000

    def test_nobody_there_is_not_waited_for_where_there_is_another_way(self, colour: Colour) -> None:
        script = Script(httpx2.ConnectError("refused"), clock=colour.clock, takes_ms=10)
        started = colour.clock.now_ms()
        with pytest.raises(BrokerUnavailable):
            colour.run(colour.client(httpx2.MockTransport(script)).acquire(REQUEST, budget_ms=35_000, gone_ms=500))
        assert 200 < colour.clock.now_ms() - started <= 600

    def test_every_broker_is_asked_before_that(self, colour: Colour) -> None:
        answers = (httpx2.ConnectTimeout("slow"), httpx2.ConnectError("refused"), granted())
        script = Script(*answers, clock=colour.clock, takes_ms=1_000)
        client = colour.client(httpx2.MockTransport(script), urls=[f"http://b{number}.invalid" for number in range(3)])
        assert colour.run(client.acquire(REQUEST, budget_ms=35_000, gone_ms=500)).epoch == 1

    def test_a_broker_that_answered_meanwhile_gets_its_silence_again(self, colour: Colour) -> None:
        refused, full = httpx2.ConnectError("refused"), problem(503, "no_ready_engine", retry_after_ms=1_000)
        answers = (refused, refused, full, refused, refused, granted())
        script, started = Script(*answers, clock=colour.clock, takes_ms=1_400), colour.clock.now_ms()
        patient = REQUEST.model_copy(update={"wait_ms": 30_000})
        assert colour.run(colour.client(httpx2.MockTransport(script)).acquire(patient, budget_ms=35_000)).epoch == 1
        assert colour.clock.now_ms() - started > 5_000

    def test_every_attempt_gets_only_what_is_left(self, colour: Colour) -> None:
        script = Script(httpx2.ReadTimeout(""), clock=colour.clock, takes_ms=1_000)
        with pytest.raises(BrokerUnavailable, match="ReadTimeout"):
            colour.run(colour.client(httpx2.MockTransport(script)).acquire(REQUEST, budget_ms=2_500))
        timeouts = [request.extensions["timeout"] for request in script.requests]
        assert [timeout["read"] for timeout in timeouts] == [2.5, 1.4, 0.2]
        assert [timeout["connect"] for timeout in timeouts] == [2.0, 1.4, 0.2]

    def test_what_is_left_of_the_patience_goes_to_the_broker(self, colour: Colour) -> None:
        script = Script(httpx2.ConnectError(""), granted(), clock=colour.clock, takes_ms=900)
        request = REQUEST.model_copy(update={"wait_ms": 30_000})
        colour.run(colour.client(httpx2.MockTransport(script)).acquire(request, budget_ms=40_000))
        assert [json.loads(sent.content)["wait_ms"] for sent in script.requests] == [30_000, 29_000]
        assert script.requests[0].extensions["timeout"]["read"] == 35.0

    def test_the_brokers_refusal_comes_before_our_own_timeout(self, colour: Colour) -> None:
        script = Script(granted())
        request = REQUEST.model_copy(update={"wait_ms": 60_000})
        colour.run(colour.client(httpx2.MockTransport(script)).acquire(request, budget_ms=10_000))
        (sent,) = script.requests
        assert json.loads(sent.content)["wait_ms"] < 1000 * sent.extensions["timeout"]["read"]

    def test_a_wish_to_come_back_later_is_honoured(self, colour: Colour) -> None:
        script = Script(problem(503, "journal_failed", headers={"Retry-After": "3"}), granted())
        colour.run(colour.client(httpx2.MockTransport(script)).acquire(REQUEST, budget_ms=10_000))
        assert colour.sleeps == [3.0]

    def test_a_wish_beyond_the_budget_ends_the_call(self, colour: Colour) -> None:
        script = Script(problem(503, "shutting_down", retry_after_ms=20_000))
        with pytest.raises(BrokerUnavailable) as caught:
            colour.run(colour.client(httpx2.MockTransport(script)).acquire(REQUEST, budget_ms=10_000))
        assert (caught.value.code, caught.value.status, colour.sleeps) == ("shutting_down", 503, [])

    def test_a_refusal_for_now_is_asked_again_within_the_patience_only(self, colour: Colour) -> None:
        refusal = problem(503, "no_ready_engine", retry_after_ms=1_000)
        script = Script(refusal, refusal, granted())
        patient = REQUEST.model_copy(update={"wait_ms": 5_000})
        assert colour.run(colour.client(httpx2.MockTransport(script)).acquire(patient, budget_ms=9_000)).epoch == 1
        assert colour.sleeps == [1.0, 1.0]
        script = Script(refusal)
        with pytest.raises(LeaseRefused) as caught:
            colour.run(colour.client(httpx2.MockTransport(script)).acquire(REQUEST, budget_ms=9_000))
        assert (len(script.requests), caught.value.retry_after_ms) == (1, 1_000)

    @given(jitter=st.floats(0, 1, exclude_max=True), budget_ms=st.integers(1, 20_000), takes_ms=st.integers(0, 3_000))
    def test_no_attempt_starts_after_the_budget(self, jitter: float, budget_ms: int, takes_ms: int) -> None:
        colour = Colour("sync")
        colour.jitter = jitter
        starts: list[int] = []
        begun = colour.clock.now_ms()

        def refuse(_: httpx2.Request) -> httpx2.Response:
            starts.append(colour.clock.now_ms() - begun)
            colour.clock.advance(takes_ms + 1)
            raise httpx2.ConnectError("refused")

        with pytest.raises(BrokerUnavailable):
            colour.client(httpx2.MockTransport(refuse)).acquire(REQUEST, budget_ms=budget_ms)
        assert starts[0] == 0
        assert all(start < budget_ms for start in starts)


class TestSeveralBrokers:
    URLS = ("http://one.invalid", "http://two.invalid/", "http://three.invalid")

    def test_the_next_one_is_tried_at_once_and_remembered(self, colour: Colour) -> None:
        script = Script(httpx2.ConnectError(""), 503, granted(), granted())
        client = colour.client(httpx2.MockTransport(script), self.URLS)
        for _ in range(2):
            colour.run(client.acquire(REQUEST, budget_ms=5_000))
        assert script.hosts == ["one.invalid", "two.invalid", "three.invalid", "three.invalid"]
        assert colour.sleeps == [0.0, 0.0]
        assert script.requests[1].url.path == "/v1/leases"

    def test_pauses_after_a_whole_round(self, colour: Colour) -> None:
        script = Script(httpx2.ConnectError(""))
        with pytest.raises(BrokerUnavailable) as caught:
            colour.run(colour.client(httpx2.MockTransport(script), self.URLS).acquire(REQUEST, budget_ms=250))
        assert colour.sleeps == [0.0, 0.0, 0.1, 0.0, 0.0]
        assert caught.value.broker_url == "http://three.invalid"

    def test_a_refusal_is_the_answer_of_the_right_broker(self, colour: Colour) -> None:
        script = Script(problem(503, "no_capacity", retry_after_ms=100))
        request = REQUEST.model_copy(update={"wait_ms": 250})
        with pytest.raises(LeaseRefused):
            colour.run(colour.client(httpx2.MockTransport(script), self.URLS).acquire(request, budget_ms=5_000))
        assert set(script.hosts) == {"one.invalid"}

    @pytest.mark.parametrize("urls", [(), ("broker:7070",), ("ftp://broker",), ("http://",), ("http://broker:port",)])
    def test_wrong_urls_are_refused_at_once(self, colour: Colour, urls: tuple[str, ...]) -> None:
        with pytest.raises(ConfigError) as caught:
            colour.client(None, urls)
        assert caught.value.key == "broker_url"

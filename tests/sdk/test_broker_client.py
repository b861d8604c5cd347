"""Calls to the broker: every rule in both colours, against the real core and against brokers that misbehave."""

import asyncio
import json
import socket
import threading

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk._broker_access import BrokerAccess
from conserve_sdk._broker_client import AsyncBrokerClient, SyncBrokerClient
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.errors import (
    BrokerUnavailable,
    ConfigError,
    LeaseExpired,
    LeaseLost,
    LeaseRefused,
    ProtocolError,
)
from conserve_sdk.protocol import (
    LeaseRequest,
    RenewalBatch,
    ReportBatch,
    SupersedeRequest,
    TurnFinishedReport,
    TurnStartedReport,
)
from conserve_sdk.testing import FakeClock, InMemoryBroker, small_fleet

from .grants import grant

REQUEST = LeaseRequest(conversation_id="c", lineage="l", model="test-model", first_turn_input_tokens=1_000)


class Colour:
    """One client, called the same way whichever colour it has; time is the fake clock's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock = FakeClock()
        self.jitter = 1.0
        self.sleeps: list[float] = []

    def client(self, transport, urls=("http://broker.invalid",), **options):
        kind = SyncBrokerClient if self.name == "sync" else AsyncBrokerClient
        return kind(
            urls,
            transport=transport,
            sleep=self.sleep if self.name == "sync" else self.asleep,
            clock=self.clock.monotonic_s,
            jitter=lambda: self.jitter,
            **options,
        )

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(round(seconds, 3))
        self.clock.advance(round(seconds * 1000))

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)

    def run(self, answer):
        return answer if self.name == "sync" else asyncio.run(answer)


@pytest.fixture(params=["sync", "async"])
def colour(request) -> Colour:
    return Colour(request.param)


class Script:
    """A broker that plays a list of answers; a number is a status, an exception is raised."""

    def __init__(self, *answers, clock: FakeClock | None = None, takes_ms: int = 0) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.clock, self.takes_ms = clock, takes_ms

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if self.clock:
            self.clock.advance(self.takes_ms)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return httpx2.Response(answer, text="not a problem document")
        return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.content)  # one per request

    @property
    def hosts(self) -> list[str]:
        return [request.url.host for request in self.requests]


def problem(status: int, code: str, *, retry_after_ms: int | None = None, headers=None) -> httpx2.Response:
    body = {"title": "t", "status": status, "detail": "the detail", "code": code, "retry_after_ms": retry_after_ms}
    return httpx2.Response(status, json=body, headers=headers)


def granted(**changes) -> httpx2.Response:
    return httpx2.Response(201, content=grant(**changes).model_dump_json())


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


class TestAnswers:
    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (problem(404, "lease_unknown"), LeaseExpired),
            (problem(409, "lease_superseded"), LeaseLost),
            (problem(410, "engine_lost"), LeaseLost),
            (problem(401, "bad_token"), LeaseLost),
            (problem(422, "bad_request"), ProtocolError),
            (httpx2.Response(404, text="nginx"), ProtocolError),
            (httpx2.Response(302, headers={"Location": "http://elsewhere.invalid"}), ProtocolError),
            (httpx2.Response(200, text="<html>"), ProtocolError),
            (httpx2.Response(200, json={"lease_id": "L1"}), ProtocolError),
        ],
    )
    def test_each_has_its_error_and_is_not_asked_again(self, colour: Colour, answer, error) -> None:
        script = Script(answer)
        request = SupersedeRequest(token="t", epoch=1, reason="r")
        with pytest.raises(error):
            colour.run(colour.client(httpx2.MockTransport(script)).supersede("L/1", request, budget_ms=5_000))
        (sent,) = script.requests
        assert sent.url.raw_path == b"/v1/leases/L%2F1/supersede"

    def test_the_error_says_which_field_is_not_understood(self, colour: Colour) -> None:
        body = json.loads(grant().model_dump_json()) | {"mode": "teleport"}
        script = Script(httpx2.Response(200, json=body))
        with pytest.raises(ProtocolError, match=r"\(mode: .*same protocol version") as caught:
            colour.run(colour.client(httpx2.MockTransport(script)).acquire(REQUEST, budget_ms=5_000))
        assert "\n" not in str(caught.value)

    def test_fields_of_a_newer_broker_are_ignored(self, colour: Colour) -> None:
        body = json.loads(grant().model_dump_json()) | {"new_field": 1}
        script = Script(httpx2.Response(200, json=body))
        assert colour.run(colour.client(httpx2.MockTransport(script)).acquire(REQUEST, budget_ms=5_000)) == grant()

    def test_a_batch_must_have_as_many_results_as_entries(self, colour: Colour) -> None:
        client = colour.client(httpx2.MockTransport(Script(httpx2.Response(200, json={"results": []}))))
        with pytest.raises(ProtocolError, match="0 results for 1"):
            colour.run(client.renew(RenewalBatch(tokens=("t",))))

    @pytest.mark.parametrize("body", [{}, {"results": [{"verdict": "ok"}]}])
    def test_a_batch_answer_must_make_sense(self, colour: Colour, body: dict) -> None:
        client = colour.client(httpx2.MockTransport(Script(httpx2.Response(200, json=body))))
        with pytest.raises(ProtocolError, match="results"):
            colour.run(client.report(ReportBatch(reports=(TurnStartedReport(token="t"),))))

    @pytest.mark.parametrize("code", ["lease_unknown", "lease_superseded"])
    def test_releasing_what_is_gone_is_no_error(self, colour: Colour, code: str) -> None:
        client = colour.client(httpx2.MockTransport(Script(problem(404, code))))
        colour.run(client.release("L1", "token"))

    def test_releasing_at_something_that_is_no_broker_is_an_error(self, colour: Colour) -> None:
        client = colour.client(httpx2.MockTransport(Script(404)))
        with pytest.raises(ProtocolError, match="is this URL a ConServe broker"):
            colour.run(client.release("L1", "token"))

    def test_the_lease_token_and_the_api_key_have_their_headers(self, colour: Colour) -> None:
        script = Script(httpx2.Response(204), granted())
        client = colour.client(httpx2.MockTransport(script), access=BrokerAccess(api_key="key"))
        colour.run(client.release("L1", "token"))
        colour.run(client.acquire(REQUEST, budget_ms=1_000))
        assert [sent.headers["Authorization"] for sent in script.requests] == ["Bearer key", "Bearer key"]
        assert [sent.headers.get("X-ConServe-Lease") for sent in script.requests] == ["token", None]


class TinyBroker:
    """A real socket that grants every lease; counts its connections."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.peers: list[int] = []
        self.threads: list[threading.Thread] = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self) -> None:
        while True:
            try:
                connection, peer = self.listener.accept()
            except OSError:
                return
            self.peers.append(peer[1])
            thread = threading.Thread(target=self.serve, args=(connection,))
            self.threads.append(thread)
            thread.start()

    def serve(self, connection: socket.socket) -> None:
        body = grant().model_dump_json().encode()
        head = f"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with connection, connection.makefile("rb") as stream:
            while request_line := stream.readline():
                assert request_line.startswith(b"POST /v1/leases")
                length = 0
                while (line := stream.readline()) not in (b"\r\n", b""):
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                stream.read(length)
                connection.sendall(head.encode() + body)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(timeout=30)
        assert not any(thread.is_alive() for thread in self.threads)


@pytest.fixture
def tiny_broker():
    broker = TinyBroker()
    yield broker
    broker.close()


class TestConnections:
    def test_the_blocking_client_keeps_its_connection_and_can_be_closed_twice(self, tiny_broker) -> None:
        client = SyncBrokerClient([tiny_broker.url])
        for _ in range(3):
            assert client.acquire(REQUEST, budget_ms=20_000) == grant()
        assert len(tiny_broker.peers) == 1
        client.close()
        client.close()
        client.acquire(REQUEST, budget_ms=20_000)
        assert len(tiny_broker.peers) == 2
        client.close()

    def test_the_async_client_keeps_one_connection_per_loop(self, tiny_broker) -> None:
        client = AsyncBrokerClient([tiny_broker.url])

        async def talk() -> None:
            for _ in range(3):
                assert await client.acquire(REQUEST, budget_ms=20_000) == grant()

        for loops in (1, 2):
            asyncio.run(talk())
            assert len(tiny_broker.peers) == loops
            assert len(client._loops) == 0  # it closed with its loop

    def test_a_forked_child_does_not_write_to_its_parents_socket(self, tiny_broker, fork_and_wait) -> None:
        client = SyncBrokerClient([tiny_broker.url])
        client.acquire(REQUEST, budget_ms=20_000)

        def child() -> None:
            client.acquire(REQUEST, budget_ms=20_000)
            client.close()

        assert fork_and_wait(child) == 0
        client.acquire(REQUEST, budget_ms=20_000)
        assert len(set(tiny_broker.peers)) == len(tiny_broker.peers) == 2
        client.close()

    def test_one_async_client_serves_several_event_loops_in_several_threads(self, tiny_broker) -> None:
        client = AsyncBrokerClient([tiny_broker.url])
        results: list[object] = []

        async def talk() -> None:
            results.append(await client.acquire(REQUEST, budget_ms=20_000))
            results.append(await client.acquire(REQUEST, budget_ms=20_000))
            await client.aclose()
            await client.aclose()

        def run() -> None:
            for _ in range(3):
                asyncio.run(talk())

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert results == [grant()] * 18

    def test_an_async_client_that_nobody_closes_leaves_no_socket_behind(self, tiny_broker) -> None:
        client = AsyncBrokerClient([tiny_broker.url])
        asyncio.run(client.acquire(REQUEST, budget_ms=20_000))  # a socket left open would warn, which is an error here

    async def test_cancelling_a_waiting_request_frees_its_place(self) -> None:
        broker = InMemoryBroker(small_fleet(decoders=1, prefillers=0), waiting="block")
        client = AsyncBrokerClient([broker.url], transport=broker)
        big = REQUEST.model_copy(update={"first_turn_input_tokens": 32_000, "wait_ms": 60_000})
        waiting: list[asyncio.Task] = []
        for name in "abcd":
            request = big.model_copy(update={"conversation_id": name})
            waiting.append(asyncio.create_task(client.acquire(request, budget_ms=90_000)))
        for _ in range(1_000):  # until all four were heard
            await asyncio.sleep(0)
        assert broker.core.waiting() + broker.core.lease_count() == 4
        assert broker.core.waiting() > 0
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert broker.core.waiting() == 0

    def test_https_brokers_get_the_shared_tls_context(self) -> None:
        with pytest.raises(BrokerUnavailable, match="ConnectError"):
            SyncBrokerClient(["https://127.0.0.1:1"]).acquire(REQUEST, budget_ms=50)

"""What the broker answers, and how it is reached, in both colours."""

import asyncio
import json
import socket
import threading

import httpx2
import pytest

from conserve_sdk._broker_access import BrokerAccess
from conserve_sdk._broker_client import AsyncBrokerClient, SyncBrokerClient
from conserve_sdk.errors import (
    BrokerUnavailable,
    LeaseExpired,
    LeaseLost,
    ProtocolError,
)
from conserve_sdk.protocol import (
    RenewalBatch,
    ReportBatch,
    SupersedeRequest,
    TurnStartedReport,
)
from conserve_sdk.testing import InMemoryBroker, small_fleet

from .callers import REQUEST, Colour, Script, granted, problem
from .grants import grant


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

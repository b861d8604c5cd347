"""Park, release and close: in which order the broker hears of things, and what they leave behind."""

from __future__ import annotations

import asyncio
import socket
import threading

import httpx2
import pytest

from conserve_sdk import ConServe, TurnCollector, conversation
from conserve_sdk._broker_client import SyncBrokerClient
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.errors import LeaseRefused
from conserve_sdk.protocol import LeaseRequest
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine

PROMPT = [{"role": "user", "content": "hello " * 400}]


def park(world) -> int:
    return world.run(lambda: world.conserve.park("c1"), lambda: world.conserve.apark("c1"))


def release(world) -> int:
    return world.run(lambda: world.conserve.release("c1"), lambda: world.conserve.arelease("c1"))


def test_the_report_of_the_last_turn_does_not_wake_a_parked_lease(world) -> None:
    world.turn()
    assert park(world) == 1  # at once: the turn's report still waits for company
    assert world.conserve.flush()
    (lease,) = world.broker.core.leases()
    assert (lease.activity, lease.turns, lease.migrations) == ("parked", 1, 1)


def test_the_client_knows_how_short_a_parked_lease_lives(world) -> None:
    world.turn()
    park(world)
    (lease,) = world.broker.core.leases()
    world.clock.advance(lease.expires_at_ms - world.clock.now_ms())
    world.turn(messages=[*PROMPT, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "more"}])
    assert world.asked() == 2  # it asked again instead of going where it has no lease any more


def test_the_last_turn_counts_before_its_lease_is_released(world) -> None:
    world.turn()
    assert release(world) == 1
    assert world.broker.core.counters.migrations == 1


def test_closing_with_release_tells_of_the_last_turn_first(world) -> None:
    world.turn()
    world.run(lambda: world.conserve.close(release=True), lambda: world.conserve.aclose(release=True))
    assert world.broker.core.lease_count() == 0
    assert world.broker.core.counters.migrations == 1


def test_closing_what_was_never_used_starts_no_thread(monkeypatch) -> None:
    """Python 3.12 starts none while it shuts down: an exit hook that tries prints a traceback."""
    broker = InMemoryBroker()
    conserve = ConServe(broker.url, broker_transport=broker, engine_transport=ScriptedEngine())
    started = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name))
    conserve.close()
    assert started == []


class BrokerInThisLoop(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """Takes reports only while the event loop runs, like a broker that lives in it."""

    def __init__(self, broker: InMemoryBroker, loop: asyncio.AbstractEventLoop) -> None:
        self.broker, self.loop = broker, loop

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        answered = threading.Event()
        self.loop.call_soon_threadsafe(answered.set)
        if not answered.wait(1.5):
            raise httpx2.ReadTimeout("the event loop stands still")
        return self.broker.handle_request(request)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return await self.broker.handle_async_request(request)


async def test_closing_does_not_stop_the_event_loop() -> None:
    broker = InMemoryBroker(settings=BrokerSettings(placement=PAPER))
    transport = BrokerInThisLoop(broker, asyncio.get_running_loop())
    conserve = ConServe(
        broker.url, broker_transport=transport, engine_transport=ScriptedEngine(then="answer"), on_turn=TurnCollector()
    )
    with conversation("c1"):
        await conserve.async_openai_client().chat.completions.create(model="test-model", messages=PROMPT)
    await conserve.aclose()
    assert conserve.reports_dropped == 0
    assert broker.core.counters.migrations == 1


# ---- many at once ---------------------------------------------------------------------------------------------

WAITING = 120
REFUSAL = b'{"title":"No","status":404,"detail":"no","code":"unknown_model"}'


class PatientBroker:
    """Answers nobody before `WAITING` requests are there."""

    def __init__(self) -> None:
        self.here = threading.Barrier(WAITING)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=WAITING)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads = [threading.Thread(target=self._serve) for _ in range(WAITING)]
        for thread in self.threads:
            thread.start()

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            connection.recv(65_536)
            self.here.wait(30)
            head = f"HTTP/1.1 404 Not Found\r\nContent-Length: {len(REFUSAL)}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode() + REFUSAL)

    def close(self) -> None:
        self.here.abort()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # a broken barrier, if it fails
def test_more_threads_than_a_pools_default_may_wait_for_admission() -> None:
    broker = PatientBroker()
    client = SyncBrokerClient([broker.url])
    ends: list[type[BaseException]] = []

    def ask(number: int) -> None:
        try:
            client.acquire(
                LeaseRequest(conversation_id=f"c{number}", lineage="l", model="m", wait_ms=20_000), budget_ms=25_000
            )
        except Exception as error:
            ends.append(type(error))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(WAITING)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
    finally:
        client.close()
        broker.close()
    assert ends == [LeaseRefused] * WAITING


# ---- cancelled in the middle of a failover --------------------------------------------------------------------


class Held(httpx2.AsyncByteStream):
    def __init__(self) -> None:
        self.closed = False

    async def __aiter__(self):
        yield b"{}"

    async def aclose(self) -> None:
        self.closed = True


async def test_a_turn_cancelled_while_it_fails_over_keeps_no_connection() -> None:
    held, asked = Held(), asyncio.Event()
    inner = InMemoryBroker(settings=BrokerSettings(placement=PAPER))
    prefill = ScriptedEngine(EngineReply.failure(500))

    class Engines(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            if request.url.host.startswith("p"):
                return await prefill.handle_async_request(request)
            return httpx2.Response(503, headers={"content-type": "application/json"}, stream=held)

    class StuckBroker(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            if request.url.path.endswith("/supersede"):
                asked.set()
                await asyncio.Event().wait()
            return await inner.handle_async_request(request)

        handle_request = inner.handle_request  # the reporter's

    conserve = ConServe(inner.url, broker_transport=StuckBroker(), engine_transport=Engines(), on_turn=TurnCollector())
    client = conserve.async_openai_client(max_retries=0)
    turn = asyncio.ensure_future(client.chat.completions.create(model="test-model", messages=PROMPT))
    async with asyncio.timeout(10):
        await asked.wait()
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    await conserve.aclose()
    assert held.closed


def test_two_processes_that_start_one_conversation_at_once_move_its_kv_once(make_world) -> None:
    """The second is answered with the first one's lease, before anybody has reported that it migrated."""
    first = make_world()
    second = make_world(broker=first.broker, engine=first.engine)
    assert not first.turn().error
    assert not second.turn().error
    pulls = [call for call in first.engine.calls if call.body.get("kv_transfer_params", {}).get("do_remote_prefill")]
    assert len(pulls) == 1
    assert (first.record.lease_id, first.record.migrated) == (second.record.lease_id, True)
    assert (second.record.migrated, second.record.decoder_id) == (False, first.record.decoder_id)

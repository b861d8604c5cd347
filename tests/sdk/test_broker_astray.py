"""Brokers that are slow, gone, back, or no brokers at all: the right error or a way round, within the time allowed."""

from __future__ import annotations

import asyncio
import gzip

import httpx2
import pytest

from conserve_sdk import BrokerError, BrokerUnavailable, ProtocolError
from conserve_sdk._broker_attempts import ANSWER_BYTES_MAX
from conserve_sdk._broker_client import AsyncBrokerClient, SyncBrokerClient
from conserve_sdk.protocol import LeaseRequest, RenewalBatch, ReportBatch, SupersedeRequest, TurnStartedReport
from conserve_sdk.testing import EngineReply, FakeClock, ScriptedEngine
from tests.support.dialogue import follow_up
from tests.support.patience import be_patient, hurry

from .directed import DirectedBroker

BUDGET_MS = 3_000


class Drip(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body that never ends: a little every second of the clock, or everything at once."""

    def __init__(self, clock: FakeClock | None, piece: bytes = b" ") -> None:
        self.clock, self.piece = clock, piece
        self.closed = False

    def __iter__(self):
        while True:
            if self.clock is not None:
                self.clock.advance(1_000)
            yield self.piece

    async def __aiter__(self):
        for chunk in self:
            yield chunk

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


ANSWERS = {
    "refused": httpx2.ConnectError("refused"),
    "silent": httpx2.ReadTimeout("slow"),
    "broken": httpx2.RemoteProtocolError("Server disconnected"),
    "500": (500, b"oops"),
    "503 page": (503, b"<html>back soon</html>"),
    "404 page": (404, b"<html>not found</html>"),
    "302": (302, b""),
    "page": (200, b"<html>it works</html>"),
    "empty": (200, b""),
    "no json": (200, b"\xff\xfe{"),
    "list": (200, b"[]"),
    "object": (200, b"{}"),
    "wrong types": (200, b'{"lease_id": 7, "results": 3, "engines": "none", "verdict": []}'),
    "deep": (200, b"[" * 100_000),
    "huge": (200, Drip(None, b" " * 1_000_000)),
}
CALLS = {
    "acquire": lambda c: c.acquire(LeaseRequest(conversation_id="c", lineage="l", model="m"), budget_ms=BUDGET_MS),
    "supersede": lambda c: c.supersede("L1", SupersedeRequest(token="t", epoch=1, reason="r"), budget_ms=BUDGET_MS),
    "park": lambda c: c.park("L1", "t", budget_ms=BUDGET_MS),
    "report": lambda c: c.report(ReportBatch(reports=(TurnStartedReport(token="t"),)), budget_ms=BUDGET_MS),
    "renew": lambda c: c.renew(RenewalBatch(tokens=("t",)), budget_ms=BUDGET_MS),
    "engines": lambda c: c.engines(budget_ms=BUDGET_MS),
    "release": lambda c: c.release("L1", "t", budget_ms=BUDGET_MS),
}


def play(answer) -> httpx2.Response:
    if isinstance(answer, Exception):
        raise answer
    status, body = answer
    return httpx2.Response(status, **({"stream": body} if isinstance(body, Drip) else {"content": body}))


class Client:
    """A broker client of one colour on a fake clock, every attempt of which takes 100 ms."""

    def __init__(self, colour: str, answer) -> None:
        self.colour, self.clock = colour, FakeClock()
        self.attempts = 0

        def handle(_: httpx2.Request) -> httpx2.Response:
            self.attempts += 1
            self.clock.advance(100)
            return play(answer(self.clock) if callable(answer) else answer)

        kind = SyncBrokerClient if colour == "sync" else AsyncBrokerClient
        self.client = kind(
            ["http://broker.invalid"],
            transport=httpx2.MockTransport(handle),
            sleep=self.sleep if colour == "sync" else self.asleep,
            clock=self.clock.monotonic_s,
            jitter=lambda: 1.0,
        )

    def sleep(self, seconds: float) -> None:
        self.clock.advance(round(seconds * 1000))

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)

    def run(self, call):
        return call(self.client) if self.colour == "sync" else asyncio.run(call(self.client))


COLOURS = pytest.mark.parametrize("colour", ["sync", "async"])


@COLOURS
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_every_call_ends_in_an_error_of_ours_in_time(colour: str, call: str, answer: str) -> None:
    client = Client(colour, ANSWERS[answer])
    started_ms = client.clock.now_ms()
    if call == "release" and answer in ("page", "empty", "no json", "list", "object", "wrong types", "deep"):
        client.run(CALLS[call])  # nothing is read of a yes
        return
    with pytest.raises((BrokerUnavailable, ProtocolError)) as caught:
        client.run(CALLS[call])
    assert client.clock.now_ms() - started_ms <= BUDGET_MS
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    silent = answer in ("refused", "silent", "broken", "500", "503 page")
    assert isinstance(caught.value, BrokerUnavailable) is silent
    assert (client.attempts > 1) is silent  # what will not get better is not asked again


@COLOURS
def test_an_answer_that_drips_is_given_up_when_its_time_is_over(colour: str) -> None:
    """Every piece comes in time, so no read of it ever times out."""
    client = Client(colour, lambda clock: (200, Drip(clock)))
    started_ms = client.clock.now_ms()
    with pytest.raises(BrokerUnavailable, match="did not end in time"):
        client.run(CALLS["acquire"])
    assert client.clock.now_ms() - started_ms <= BUDGET_MS + 1_100  # one more piece, of one more second


@COLOURS
def test_an_endless_answer_is_left_soon_and_its_connection_closed(colour: str) -> None:
    body = Drip(None, b" " * 1_000_000)
    client = Client(colour, (200, body))
    with pytest.raises(ProtocolError, match=f"longer than {ANSWER_BYTES_MAX} bytes: is this URL a ConServe broker"):
        client.run(CALLS["renew"])
    assert body.closed


@COLOURS
def test_a_compressed_answer_is_read(colour: str) -> None:
    packed = gzip.compress(b'{"engines": []}')
    transport = httpx2.MockTransport(
        lambda _: httpx2.Response(200, headers={"content-encoding": "gzip"}, content=packed)
    )
    kind = SyncBrokerClient if colour == "sync" else AsyncBrokerClient
    client = kind(["http://broker.invalid"], transport=transport)
    listed = client.engines() if colour == "sync" else asyncio.run(client.engines())
    assert listed.engines == ()


# ---- whole conversations --------------------------------------------------------------------------------------


class Astray(DirectedBroker):
    """A good broker until `says` is set; then everything gets that answer."""

    says = None

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        if self.says is None:
            return super().handle_request(request)
        response = play(self.says)
        response.request = request
        return response


@pytest.fixture
def astray(make_world):
    def make(**options):
        world = make_world(broker=Astray(), wait_s=0, **options)
        _count_time_by(world)
        return world

    return make


def _count_time_by(world) -> None:
    """Calls to the broker live by the world's clock, which only their own pauses move: a busy machine costs no time."""
    runtime = world.conserve._runtime
    clock = world.clock

    def sleep(seconds: float) -> None:
        clock.advance(round(seconds * 1000))

    async def asleep(seconds: float) -> None:
        sleep(seconds)

    for client, pause in ((runtime.broker, sleep), (runtime.async_broker, asleep)):
        client._clock, client._sleep, client._jitter = clock.monotonic_s, pause, lambda: 1.0


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_new_conversation_gets_an_error_of_ours(astray, answer: str) -> None:
    world = astray()
    world.broker.says = ANSWERS[answer]
    hurry(world.conserve)
    outcome = world.turn(max_retries=2)
    assert isinstance(outcome.error, BrokerError)
    assert world.engines_called == []
    world.broker.says = None
    be_patient(world.conserve)
    assert world.turn().text == "ok"  # and nothing is left of it
    assert (world.record.lease_id is not None, world.record.loss) == (True, "")


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_new_conversation_may_fall_back(astray, answer: str) -> None:
    world = astray(fallback_engines=["http://f0.invalid"])
    world.broker.says = ANSWERS[answer]
    hurry(world.conserve)
    assert world.turn().text == "ok"
    assert (world.engines_called, world.record.loss) == (["f0"], "broker_unavailable")


@pytest.mark.parametrize(("status", "code"), [(401, "unauthorized"), (400, "bad_request"), (422, "bad_request")])
def test_a_broker_that_says_no_is_there(astray, status: int, code: str) -> None:
    """Falling back would hide a wrong key for ever."""
    world = astray(fallback_engines=["http://f0.invalid"])
    body = b'{"title": "No", "status": %d, "detail": "no", "code": "%s"}' % (status, code.encode())
    world.broker.says = (status, body)
    assert isinstance(world.turn().error, ProtocolError)
    assert world.engines_called == []


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_conversation_with_a_lease_does_not_notice(astray, answer: str) -> None:
    world = astray()
    world.turn()
    world.reports()
    world.broker.says = ANSWERS[answer]
    hurry(world.conserve)
    for turns in (1, 2):
        assert world.turn(messages=follow_up(turns)).text == "ok"
    assert world.engines_called == ["p0", "d0", "d0", "d0"]
    world.broker.says = None
    be_patient(world.conserve)
    world.turn(messages=follow_up(3))
    assert (world.record.epoch, world.record.loss) == (1, "")


@pytest.mark.parametrize("answer", ["refused", "page", "404 page", "huge"])
def test_a_decoder_that_fails_meanwhile_leaves_its_own_error_or_a_fallback(astray, answer: str) -> None:
    for fallback, expected in ((), "APIConnectionError"), (("http://f0.invalid",), None):
        engine = ScriptedEngine(then="answer")
        world = astray(engine=engine, fallback_engines=fallback)
        world.turn()
        world.reports()
        world.broker.says = ANSWERS[answer]
        hurry(world.conserve)
        engine.script("d0", EngineReply.unreachable())
        outcome = world.turn(messages=follow_up(1))
        assert (type(outcome.error).__name__ if outcome.error else None) == expected


@pytest.mark.parametrize("answer", ["page", "object", "404 page", "deep"])
def test_reports_parks_and_releases_disturb_nobody(astray, answer: str) -> None:
    world = astray()
    world.turn()
    world.broker.says = ANSWERS[answer]
    hurry(world.conserve)
    assert world.conserve.flush(30)  # given up, and counted
    assert world.conserve.reports_dropped == 2
    world.clock.advance(25_000)
    world.conserve._runtime.reporter.pump(world.clock.now_ms())  # a renewal, perhaps
    assert world.run(lambda: world.conserve.park("c1"), lambda: world.conserve.apark("c1")) == 0
    released = world.run(lambda: world.conserve.release("c1"), lambda: world.conserve.arelease("c1"))
    assert released == (0 if answer == "404 page" else 1)


def test_a_broker_that_restarts_with_an_empty_journal_takes_the_lease_back(world) -> None:
    world.turn()
    world.reports()
    world.broker.restart(lose_state=True)
    assert world.broker.core.lease_count() == 0
    world.turn(messages=follow_up(1))
    world.reports()
    (lease,) = world.broker.core.leases()
    assert (lease.lease_id, lease.migrations) == (world.record.lease_id, 1)
    world.turn(messages=follow_up(2))
    assert world.engines_called == ["p0", "d0", "d0", "d0"]

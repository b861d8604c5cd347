"""`GET /v1/events`: snapshots for who listens, nothing for nobody; and the history that comes first."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest

from conserve_broker.feed import Feed
from conserve_broker.front import Front
from conserve_broker.history import FIELDS, SAMPLE_EVERY_MS, SAMPLES_MAX, Everyone, History, totals_of
from conserve_broker.server import BrokerServer
from conserve_broker.service import Observer
from conserve_broker.settings import BrokerConfig
from conserve_broker.snapshot import HistoryInfo, Snapshot, snapshot_of
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk._desk import Outcome, ProblemRaised
from conserve_sdk.core import Broker, Ms, TimerFired

BUDGET_S = 40.0
SAID = Snapshot(at_ms=0, version="1", role="alone", leader_url="", ready=True, reasons=(), warnings=())


class Source:
    """Makes snapshots and counts them."""

    def __init__(self, role: str = "alone") -> None:
        self.made = 0
        self.role = role
        self.leader_url = ""
        self.broken = False
        self._wanted: tuple[int, asyncio.Event] | None = None

    async def until(self, made: int) -> None:
        """Come back once that many were made."""
        self._wanted = made, asyncio.Event()
        await asyncio.wait_for(self._wanted[1].wait(), BUDGET_S)

    def __call__(self) -> Snapshot:
        if self.broken:
            raise RuntimeError("broken")
        self.made += 1
        if self._wanted is not None and self.made >= self._wanted[0]:
            self._wanted[1].set()
        return SAID.model_copy(update={"at_ms": self.made, "role": self.role, "leader_url": self.leader_url})


def feed_of(source: Source, **options: Any) -> Feed:
    options = {"interval_s": 0.01, "heartbeat_s": BUDGET_S, **options}
    return Feed(source, HistoryInfo, **options)


def parsed(event: bytes) -> tuple[str, str, dict[str, Any]]:
    fields = dict(line.split(": ", 1) for line in event.decode().splitlines() if line and not line.startswith(":"))
    return fields.get("event", ""), fields.get("id", ""), json.loads(fields.get("data", "{}"))


async def drained(events: AsyncIterator[bytes]) -> None:
    async with asyncio.timeout(BUDGET_S):
        async for _ in events:
            pass


async def following(events: AsyncIterator[bytes]) -> tuple[str, str, dict[str, Any]]:
    return parsed(await asyncio.wait_for(anext(events), BUDGET_S))


async def test_history_first_then_whole_snapshots() -> None:
    feed = feed_of(Source())
    with feed.seat():
        events = feed.events()
        first = await asyncio.wait_for(anext(events), BUDGET_S)
        assert first.startswith(b"retry: 1000\n\nevent: history\n")
        seen = [await following(events) for _ in range(3)]
    assert [name for name, _, _ in seen] == ["snapshot"] * 3
    assert [data["at_ms"] for _, _, data in seen] == [1, 2, 3]
    assert len({event_id for _, event_id, _ in seen}) == 3


async def test_nobody_listens_nothing_is_made() -> None:
    source = Source()
    feed = feed_of(source)
    await asyncio.sleep(0.05)
    assert source.made == 0
    with feed.seat():
        events = feed.events()
        await following(events)
        await following(events)
    made = source.made
    await asyncio.sleep(0.05)
    assert source.made == made
    assert feed.listeners == 0


async def test_all_listeners_share_one_snapshot() -> None:
    source = Source()
    feed = feed_of(source, interval_s=BUDGET_S)
    with feed.seat(), feed.seat():
        one, other = feed.events(), feed.events()
        told = [await anext(events) for events in (one, one, other, other)]
    assert told[1] is told[3]
    assert source.made == 1


async def test_a_slow_listener_skips_to_the_newest() -> None:
    source = Source()
    feed = feed_of(source)
    with feed.seat():
        events = feed.events()
        await following(events)
        _, _, before = await following(events)
        await source.until(before["at_ms"] + 20)  # it reads nothing meanwhile
        _, _, after = await following(events)
    assert after["at_ms"] >= before["at_ms"] + 20


async def test_a_returning_listener_is_not_told_twice() -> None:
    source = Source()
    feed = feed_of(source, interval_s=BUDGET_S, heartbeat_s=0.01)
    with feed.seat():
        events = feed.events()
        await following(events)
        _, event_id, _ = await following(events)
        again = feed.events(event_id)
        await following(again)
        assert await asyncio.wait_for(anext(again), BUDGET_S) == b": nothing new\n\n"
        stranger = feed.events("another-life-1")
        await following(stranger)
        assert (await following(stranger))[0] == "snapshot"


async def test_a_standby_tells_only_what_changed() -> None:
    source = Source("standby")
    feed = feed_of(source, heartbeat_s=0.03)
    with feed.seat():
        events = feed.events()
        await following(events)
        await following(events)
        while source.made < 5:
            assert await asyncio.wait_for(anext(events), BUDGET_S) == b": nothing new\n\n"
        source.leader_url = "http://b"
        async with asyncio.timeout(BUDGET_S):
            while (told := await following(events))[0] != "snapshot":
                pass
    assert told[2]["leader_url"] == "http://b"


async def test_seats_are_counted() -> None:
    feed = feed_of(Source(), listeners_max=1)
    with feed.seat():
        with pytest.raises(ProblemRaised) as full, feed.seat():
            pass
        assert (full.value.problem.status, full.value.problem.code) == (503, "too_many_listeners")
    with feed.seat():
        pass
    feed.close()
    with pytest.raises(ProblemRaised) as closed, feed.seat():
        pass
    assert closed.value.problem.code == "shutting_down"


async def test_closing_ends_the_streams() -> None:
    feed = feed_of(Source(), interval_s=BUDGET_S)
    with feed.seat():
        events = feed.events()
        await following(events)
        await following(events)
        ending = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        feed.close()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(ending, BUDGET_S)


async def test_what_breaks_a_snapshot_breaks_the_stream_and_the_next_one_begins_anew() -> None:
    source = Source()
    feed = feed_of(source)
    with feed.seat():
        events = feed.events()
        await following(events)
        await following(events)
        source.broken = True
        with pytest.raises(RuntimeError, match="broken"):
            await drained(events)
        source.broken = False
        events = feed.events()
        await following(events)
        assert (await following(events))[0] == "snapshot"


# ---- history ----------------------------------------------------------------------------------------------------


def happened(at_ms: int) -> Outcome:
    return Outcome(reply=None, waiting=None, settled=(), events=(TimerFired(now_ms=Ms(at_ms)),), decisions=())


def test_history_is_a_ring_of_samples() -> None:
    history = History()
    history.decided(happened(1))
    assert history.samples == (), "no core is watched"
    core = Broker()
    history.watch(core)
    for at_ms in (10, 20, 10 + SAMPLE_EVERY_MS - 1, 10 + SAMPLE_EVERY_MS):
        history.decided(happened(at_ms))
    history.decided(Outcome(reply=None, waiting=None, settled=(), events=(), decisions=()))
    assert [sample[0] for sample in history.samples] == [10, 10 + SAMPLE_EVERY_MS]
    assert history.samples[0][1:] == totals_of(core) == (0,) * len(FIELDS)
    for turn in range(SAMPLES_MAX + 5):
        history.decided(happened(1_000_000 + turn * SAMPLE_EVERY_MS))
    assert len(history.samples) == SAMPLES_MAX
    history.forget()
    assert history.samples == ()


def test_everyone_hears_everything() -> None:
    heard: list[Any] = []

    class Ear(Observer):
        def handled(self, route: str, seconds: float) -> None:
            heard.append((route, seconds))

        def decided(self, outcome: Outcome) -> None:
            heard.append(outcome)

        def committed(self, seconds: float) -> None:
            heard.append(seconds)

    both = Everyone([Ear(), Ear()])
    outcome = happened(1)
    both.handled("route", 0.5)
    both.decided(outcome)
    both.committed(0.25)
    assert heard == [("route", 0.5)] * 2 + [outcome] * 2 + [0.25] * 2


# ---- a real broker ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fleet() -> Iterator[EmulatedFleet]:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=1, time_scale=0)) as running:
        yield running


@pytest.fixture
def broker(fleet: EmulatedFleet) -> Iterator[BrokerServer]:
    tables = {"listen": {"port": 0}, "scrape": {"interval_ms": 100}, "watch": {"event_listeners_max": 2}}
    with BrokerServer(BrokerConfig.from_mapping({**tables, "engine": fleet.broker_engines()})) as server:
        server.wait_until_ready(engines=2, timeout_s=BUDGET_S)
        yield server


def events_of(response: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def test_a_broker_tells_what_it_knows(broker: BrokerServer) -> None:
    body = {"conversation_id": "c", "lineage": "main", "model": "emulated", "first_turn_input_tokens": 100}
    with httpx2.stream("GET", f"{broker.url}/v1/events", timeout=BUDGET_S) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        events = events_of(response)
        name, history = next(events)
        assert name == "history"
        assert history["fields"] == list(FIELDS)
        assert history["samples"], "it was kept before anybody listened"
        _, told = next(events)
        assert (told["role"], told["ready"], told["leases"]["busy"]) == ("alone", True, 0)
        assert [engine["engine_id"] for engine in told["engines"]] == ["d0", "p0"]
        assert httpx2.post(f"{broker.url}/v1/leases", json=body).is_success
        while told["totals"]["grants"] == 0:
            _, told = next(events)
        assert told["leases"] == {"busy": 1, "idle": 0, "parked": 0}


def test_listeners_are_bounded_and_counted(broker: BrokerServer) -> None:
    url = f"{broker.url}/v1/events"
    with httpx2.stream("GET", url, timeout=BUDGET_S) as one, httpx2.stream("GET", url, timeout=BUDGET_S) as other:
        listening = [events_of(one), events_of(other)]
        assert [next(events)[0] for events in listening] == ["history"] * 2
        assert "conserve_event_listeners 2.0" in httpx2.get(f"{broker.url}/metrics").text
        refused = httpx2.get(url, timeout=BUDGET_S)
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_listeners")
        assert refused.headers["retry-after"] == "5"


def test_stopping_does_not_wait_for_listeners(broker: BrokerServer) -> None:
    with httpx2.stream("GET", f"{broker.url}/v1/events", timeout=BUDGET_S) as response:
        events = events_of(response)
        next(events)
        stopping = threading.Thread(target=broker.stop)
        stopping.start()
        assert {name for name, _ in events} <= {"snapshot"}, "the stream ends of itself"
        stopping.join(BUDGET_S)
        assert not stopping.is_alive()


def test_a_standby_says_who_leads() -> None:
    class Follower:
        follows = True
        leader_url = "http://leader:7070"
        failure = ""
        retry_after_ms = 100

        def leads(self) -> bool:
            return False

    told = snapshot_of(Front(leadership=Follower()), now_ms=5)
    assert (told.role, told.leader_url, told.ready) == ("standby", "http://leader:7070", False)
    assert told.reasons == ("standby: http://leader:7070 leads",)
    assert told.engines == ()


def test_the_document_describes_the_events(broker: BrokerServer) -> None:
    paths = httpx2.get(f"{broker.url}/openapi.json").json()["paths"]
    told = paths["/v1/events"]["get"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    assert [part["title"] for part in told["anyOf"]] == ["HistoryInfo", "Snapshot"]
    assert set(paths["/readyz"]["get"]["responses"]) == {"200", "503"}
    query = {parameter["name"] for parameter in paths["/v1/leases"]["get"]["parameters"]}
    assert {"state", "engine_id", "tenant", "conversation_id", "min_age_ms", "limit", "cursor"} <= query

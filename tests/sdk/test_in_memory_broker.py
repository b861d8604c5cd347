"""The public test broker: waiting, outages, imagined engines and its clock."""

import asyncio
import threading
from typing import Any

import httpx2
import pytest

from conserve_sdk.core import BrokerSettings, Ms
from conserve_sdk.protocol import LeaseGrant, Problem
from conserve_sdk.testing import FakeClock, InMemoryBroker, small_fleet

BIG = 32_000


def body(conversation: str, *, tokens: int = BIG, wait_ms: int = 0) -> dict[str, Any]:
    return {
        "conversation_id": conversation,
        "lineage": "main",
        "model": "test-model",
        "first_turn_input_tokens": tokens,
        "wait_ms": wait_ms,
    }


def sync_client(broker: InMemoryBroker) -> httpx2.Client:
    return httpx2.Client(transport=broker, base_url=broker.url)


def async_client(broker: InMemoryBroker) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=broker, base_url=broker.url)


def fill(broker: InMemoryBroker) -> list[LeaseGrant]:
    """Two big conversations, after which a third does not fit on the only decoder."""
    client = sync_client(broker)
    answers = [client.post("/v1/leases", json=body(f"full-{number}")) for number in range(2)]
    return [LeaseGrant.model_validate_json(answer.content) for answer in answers]


def release(broker: InMemoryBroker, grant: LeaseGrant) -> None:
    headers = {"authorization": f"Lease {grant.token}"}
    assert sync_client(broker).delete(f"/v1/leases/{grant.lease_id}", headers=headers).status_code == 204


def one_decoder(**options: Any) -> InMemoryBroker:
    return InMemoryBroker(small_fleet(prefillers=0, decoders=1), **options)


# ---- waiting ----------------------------------------------------------------------------------------------------


def test_alone_a_waiting_request_skips_to_its_deadline() -> None:
    broker = one_decoder()
    fill(broker)
    started_ms = broker.clock.now_ms()
    answer = sync_client(broker).post("/v1/leases", json=body("late", wait_ms=5_000))
    assert Problem.model_validate_json(answer.content).code == "no_capacity"
    assert broker.clock.now_ms() == started_ms + 5_000


def test_what_expires_on_the_way_makes_room() -> None:
    broker = one_decoder(settings=BrokerSettings(ttl_ms=Ms(6_000)))
    fill(broker)
    started_ms = broker.clock.now_ms()
    answer = sync_client(broker).post("/v1/leases", json=body("late", wait_ms=60_000))
    assert answer.status_code == 201
    assert broker.clock.now_ms() == started_ms + 6_000
    assert LeaseGrant.model_validate_json(answer.content).decision.waited_ms == 6_000


def test_blocking_waits_for_another_thread() -> None:
    broker = one_decoder(waiting="block")
    first, _ = fill(broker)
    answers: list[httpx2.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(sync_client(broker).post("/v1/leases", json=body("late", wait_ms=60_000)))
    )
    thread.start()
    until(lambda: broker.core.waiting() == 1)
    assert not answers
    release(broker, first)
    thread.join(timeout=30)
    assert [answer.status_code for answer in answers] == [201]


def test_blocking_ends_when_the_clock_reaches_the_deadline() -> None:
    broker = one_decoder(waiting="block")
    fill(broker)
    answers: list[httpx2.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(sync_client(broker).post("/v1/leases", json=body("late", wait_ms=5_000)))
    )
    thread.start()
    until(lambda: broker.core.waiting() == 1)
    broker.clock.advance(4_999)
    assert broker.core.waiting() == 1
    broker.clock.advance(1)
    thread.join(timeout=30)
    assert [answer.status_code for answer in answers] == [503]


async def test_tasks_wait_and_are_cancelled() -> None:
    broker = one_decoder(waiting="block")
    first, _ = fill(broker)
    async with async_client(broker) as client:
        stays = asyncio.create_task(client.post("/v1/leases", json=body("stays", wait_ms=60_000)))
        leaves = asyncio.create_task(client.post("/v1/leases", json=body("leaves", wait_ms=60_000)))
        while broker.core.waiting() < 2:  # noqa: ASYNC110  # the broker has no event to wait for
            await asyncio.sleep(0)
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        assert broker.core.waiting() == 1
        release(broker, first)
        assert (await stays).status_code == 201


async def test_async_clients_are_served_without_waiting_too() -> None:
    broker = InMemoryBroker()
    async with async_client(broker) as client:
        assert (await client.get("/v1/fleet")).json()["leases"] == 0
    assert (await async_client(broker).get("/v1/fleet")).status_code == 200, "closing a client does not close it"
    sync_client(broker).close()
    assert sync_client(broker).get("/v1/fleet").status_code == 200


# ---- outages ----------------------------------------------------------------------------------------------------


def test_a_stopped_broker_refuses_connections_and_ends_who_waits() -> None:
    broker = one_decoder(waiting="block")
    fill(broker)
    faults: list[Exception] = []

    def wait() -> None:
        try:
            sync_client(broker).post("/v1/leases", json=body("late", wait_ms=60_000))
        except httpx2.TransportError as fault:
            faults.append(fault)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: broker.core.waiting() == 1)
    broker.stop()
    thread.join(timeout=30)
    assert [type(fault) for fault in faults] == [httpx2.RemoteProtocolError]
    with pytest.raises(httpx2.ConnectError):
        sync_client(broker).get("/v1/fleet")


def test_a_restart_recovers_what_the_journal_holds() -> None:
    broker = InMemoryBroker()
    kept = sync_client(broker).post("/v1/leases", json=body("kept")).json()
    assert [lease.lease_id for lease in broker.journal()] == [kept["lease_id"]]
    broker.restart()
    again = sync_client(broker).post("/v1/leases", json=body("kept")).json()
    assert (again["lease_id"], again["reused"]) == (kept["lease_id"], True)
    broker.restart(lose_state=True)
    fresh = sync_client(broker).post("/v1/leases", json=body("kept")).json()
    assert fresh["lease_id"] != kept["lease_id"]


def test_time_passes_without_a_stopped_broker() -> None:
    broker = InMemoryBroker(settings=BrokerSettings(ttl_ms=Ms(6_000)))
    sync_client(broker).post("/v1/leases", json=body("kept"))
    broker.stop()
    broker.clock.advance(100_000)
    broker.start()
    assert broker.core.lease_count() == 1, "the grace after a restart"
    broker.clock.advance(30_000)
    assert broker.core.lease_count() == 0


def test_it_fails_when_told() -> None:
    broker = InMemoryBroker()
    client = sync_client(broker)
    broker.fail_next(2, status=500)
    assert [client.get("/v1/fleet").status_code for _ in range(3)] == [500, 500, 200]
    assert [(one.method, one.path, one.status) for one in broker.exchanges] == [
        ("GET", "/v1/fleet", 500),
        ("GET", "/v1/fleet", 500),
        ("GET", "/v1/fleet", 200),
    ]


def test_exchanges_keep_what_was_asked() -> None:
    broker = InMemoryBroker()
    sync_client(broker).post("/v1/leases", content=b"{")
    [one] = broker.exchanges
    assert (one.request, one.status) == (b"{", 400)


# ---- engines and time -------------------------------------------------------------------------------------------


def states(broker: InMemoryBroker) -> dict[str, str]:
    return {view.engine_id: view.state.value for view in broker.core.engines()}


def test_engines_stay_ready_however_long_time_passes() -> None:
    broker = InMemoryBroker()
    broker.clock.advance(3_600_000)
    assert set(states(broker).values()) == {"ready"}


def test_a_failing_engine_becomes_suspect_then_gone_each_at_its_time() -> None:
    broker = InMemoryBroker()
    broker.fail_engine("d0")
    broker.clock.advance(2_999)
    assert states(broker)["d0"] == "ready"
    broker.clock.advance(1)
    assert states(broker)["d0"] == "suspect"
    broker.clock.advance(11_999)
    assert states(broker)["d0"] == "suspect"
    broker.clock.advance(1)
    assert states(broker)["d0"] == "gone"
    broker.restart_engine("d0")
    assert states(broker)["d0"] == "ready"


def test_a_loaded_engine_shows_its_load() -> None:
    broker = InMemoryBroker()
    broker.load_engine("d0", kv_used_tokens=80_000, running=3)
    assert sync_client(broker).post("/v1/leases", json=body("new")).json()["decoder"]["engine_id"] == "d1"
    assert sync_client(broker).get("/v1/engines/d0").json()["running"] == 3
    with pytest.raises(KeyError):
        broker.load_engine("nobody")


def test_changing_an_engine_of_a_stopped_broker_shows_after_the_start() -> None:
    broker = InMemoryBroker()
    broker.stop()
    broker.load_engine("d0", running=7)
    broker.start()
    assert sync_client(broker).get("/v1/engines/d0").json()["running"] == 7


def test_the_clock_only_goes_forward() -> None:
    clock = FakeClock(1_000)
    heard: list[int] = []
    clock.on_advance(lambda: heard.append(clock.now_ms()))
    assert clock.advance(500) == 1_500
    assert clock.monotonic_s() == 1.5
    with pytest.raises(ValueError, match="-1 ms"):
        clock.advance(-1)
    assert heard == [1_500]


def until(condition: Any) -> None:
    deadline = threading.Event()
    for _ in range(3_000):
        if condition():
            return
        deadline.wait(0.01)
    raise AssertionError("the condition never came true")

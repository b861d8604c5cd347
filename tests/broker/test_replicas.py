"""Several brokers over one real store, as processes: whatever happens to the leader, nothing acknowledged is lost and
no key is held twice."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest

from conserve_broker._config_tables import StoreTable
from conserve_broker.redis_store import RedisStore
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk import ConServe, TurnCollector, conversation
from conserve_sdk.protocol import RENEWALS_MAX, BatchAnswer, FleetInfo, LeaseExplanation, LeaseGrant, Problem

from .broker_process import BrokerProcess, Load, until
from .redis_server import NEEDS_SERVER, Proxy, RedisServer

pytestmark = [NEEDS_SERVER, pytest.mark.timeout(150)]

TTL_MS = 4_000
"""Long enough that a machine which is busy elsewhere for a second or two changes no leader by itself."""
KEY = {"kid": "shared", "secret": "the same secret for every replica of this fleet"}


@pytest.fixture(scope="module")
def fleet() -> Iterator[EmulatedFleet]:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0, tool_calls_min=0)) as running:
        yield running


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


class Replicas:
    """Brokers `a`, `b`, ... on one store; each may reach it by another way."""

    def __init__(self, folder: Path, fleet: EmulatedFleet, redis: RedisServer, stack: contextlib.ExitStack) -> None:
        self._folder, self._fleet, self._redis, self._stack = folder, fleet, redis, stack
        self.all: list[BrokerProcess] = []

    def add(self, *, store_url: str = "", **tables: Any) -> BrokerProcess:
        """Start one more; the first leads."""
        name = "abc"[len(self.all)]
        configured = {
            "listen": {"port": 0},
            "scrape": {"interval_ms": 100},
            "store": {"kind": "redis", "url": store_url or self._redis.url, "lock_ttl_ms": TTL_MS},
            "token.keys": [KEY],
            **tables,
            "engine": self._fleet.broker_engines(),
        }
        broker = BrokerProcess(self._folder / f"{name}.toml", configured)
        self._stack.enter_context(broker)
        self.all.append(broker)
        until(lambda: broker.readyz()["role"] == ("standby" if len(self.all) > 1 else "leader"), what="the role")
        if len(self.all) == 1:
            until(lambda: all(engine.state == "ready" for engine in broker.fleet().engines), what="the fleet")
        return broker


@pytest.fixture
def replicas(tmp_path: Path, fleet: EmulatedFleet, redis: RedisServer) -> Iterator[Replicas]:
    with contextlib.ExitStack() as stack:
        yield Replicas(tmp_path, fleet, redis, stack)


@contextlib.contextmanager
def load_on(*brokers: BrokerProcess) -> Iterator[Load]:
    load = Load(*(broker.url for broker in brokers)).start()
    try:
        until(lambda: load.grants > 20, what="the load")
        yield load
    finally:
        load.stop()


def goes_on(load: Load) -> None:
    before = load.grants
    until(lambda: load.grants > before + 20, what="grants after the failure")


def leads(broker: BrokerProcess) -> bool:
    return broker.readyz()["role"] == "leader"


def answered(brokers: Sequence[BrokerProcess], send: Callable[[BrokerProcess], httpx2.Response]) -> httpx2.Response:
    """The answer of whoever leads; a leader may change at any time, and one that just did refuses."""
    answers: list[httpx2.Response] = []

    def found() -> bool:
        for broker in brokers:
            with contextlib.suppress(httpx2.TransportError):
                response = send(broker)
                if response.is_success:
                    answers.append(response)
                    return True
        return False

    until(found, what="an answer of the leader")
    return answers[0]


def renewed(brokers: Sequence[BrokerProcess], grants: Sequence[LeaseGrant]) -> set[str]:
    verdicts: set[str] = set()
    for start in range(0, len(grants), RENEWALS_MAX):
        body = {"tokens": [grant.token for grant in grants[start : start + RENEWALS_MAX]]}
        response = answered(
            brokers, lambda broker, body=body: httpx2.post(f"{broker.url}/v1/renewals", json=body, timeout=20)
        )
        verdicts |= {status.verdict for status in BatchAnswer.model_validate_json(response.content).results}
    return verdicts


def nothing_is_lost(load: Load, *brokers: BrokerProcess) -> None:
    """Every lease that was acknowledged answers at the leader, and asking for its key finds it again."""
    assert load.held
    assert renewed(brokers, list(load.held.values())) == {"ok"}
    for name in list(load.held)[:: max(1, len(load.held) // 20)]:
        found = answered(brokers, lambda broker, name=name: broker.ask(name))
        again = LeaseGrant.model_validate_json(found.content)
        assert (again.lease_id, again.reused) == (load.held[name].lease_id, True), "one lease for one key"
    fleet = answered(brokers, lambda broker: httpx2.get(f"{broker.url}/v1/fleet", timeout=20))
    live = sum(engine.leases for engine in FleetInfo.model_validate_json(fleet.content).engines)
    # An end that a broker acknowledged while it could not write may be forgotten: that lease runs out by itself.
    assert len(load.held) <= live <= len(load.held) + len(load.unsure) + len(load.released)


def problem(response: httpx2.Response) -> Problem:
    assert response.headers["content-type"] == "application/problem+json"
    return Problem.model_validate_json(response.content)


# ---- standing by ------------------------------------------------------------------------------------------------


def test_a_standby_says_who_leads_and_answers_nothing_else(replicas: Replicas) -> None:
    leader, standby = replicas.add(), replicas.add()
    grant = leader.grant("c")
    refused = standby.ask("c")
    found = problem(refused)
    assert (refused.status_code, found.code, found.leader_url) == (503, "not_leader", leader.url)
    assert int(refused.headers["retry-after"]) >= 1
    assert found.retry_after_ms is not None
    assert leader.url in found.detail
    for path, body in (("/v1/renewals", {"tokens": [grant.token]}), ("/v1/reports", {"reports": []})):
        assert problem(httpx2.post(standby.url + path, json=body)).code == "not_leader"
    assert problem(httpx2.get(f"{standby.url}/v1/fleet")).code == "not_leader"
    ready = httpx2.get(f"{standby.url}/readyz")
    assert (ready.status_code, ready.json()["role"]) == (503, "standby")
    assert ready.json()["reasons"] == [f"standby: {leader.url} leads"]
    for_orchestrators = httpx2.get(f"{standby.url}/readyz", params={"standby": "ok"})
    assert (for_orchestrators.status_code, for_orchestrators.json()["ready"]) == (200, False)
    assert httpx2.get(f"{standby.url}/healthz").status_code == 200
    assert (leader.readyz()["ready"], leader.readyz()["role"]) == (True, "leader")


# ---- the leader dies --------------------------------------------------------------------------------------------


def test_a_killed_leader_is_replaced_and_comes_back_as_a_standby(replicas: Replicas) -> None:
    first, second = replicas.add(), replicas.add()
    with load_on(first, second) as load:
        until(lambda: len(load.held) > 0)
        grant = next(iter(load.held.values()))
        first.kill()
        until(lambda: leads(second), what="the failover")
        goes_on(load)
        explained = httpx2.get(f"{second.url}/v1/leases/{grant.lease_id}/explain", timeout=20)
        told = LeaseExplanation.model_validate_json(explained.content)
        assert len(told.decision.candidates) > 1  # what the leader that died had read of the fleet
        first.start()
        until(lambda: first.readyz()["role"] == "standby")
        second.kill()
        until(lambda: leads(first), what="the failover back")
        goes_on(load)
    nothing_is_lost(load, first, second)


def test_a_planned_end_hands_over_before_the_lock_runs_out(replicas: Replicas) -> None:
    """With a lock of a minute, only the release can have let the other one lead."""
    store = {"kind": "redis", "url": replicas._redis.url, "lock_ttl_ms": 60_000}
    first, second = replicas.add(store=store), replicas.add(store=store)
    with load_on(first, second) as load:
        first.signal(signal.SIGTERM)
        until(lambda: leads(second), budget_s=30, what="the handover")
        goes_on(load)
        assert first.wait() == 0
    nothing_is_lost(load, first, second)


# ---- the leader is paused or cut off ----------------------------------------------------------------------------


def test_a_leader_that_was_paused_past_its_lock_does_not_grant(replicas: Replicas) -> None:
    first, second = replicas.add(), replicas.add()
    with load_on(first, second) as load:
        first.signal(signal.SIGSTOP)
        load.urls = [second.url]
        until(lambda: leads(second), what="the failover")
        goes_on(load)
        # These wait in the old leader's socket; they are the first that it sees when it wakes.
        held = next(iter(load.held))
        waiting = [_asked_later(first, name) for name in (held, "brand-new")]
        first.signal(signal.SIGCONT)
        for answer in waiting:
            assert problem(answer()).code == "not_leader"
        until(lambda: first.readyz()["role"] == "standby", what="the old leader as a standby")
        assert problem(first.ask("another")).leader_url == second.url
        assert "conserve_leases_active" not in httpx2.get(f"{first.url}/metrics").text, "what it knew is out of date"
    nothing_is_lost(load, first, second)
    # A release that was written, but whose answer the pause held back, leaves its caller with a token that re-adopts.
    assert second.metric("conserve_lease_readopted_total") <= len(load.unsure), "the table was warm"


def _asked_later(broker: BrokerProcess, name: str) -> Any:
    """A request that is sent now and answered whenever the broker comes round."""
    answers: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: answers.append(broker.ask(name)))
    thread.start()
    time.sleep(0.2)

    def answer() -> httpx2.Response:
        thread.join(30)
        return answers[0]

    return answer


def test_a_leader_cut_off_from_the_store_steps_down(replicas: Replicas, redis: RedisServer) -> None:
    with Proxy(redis.port) as proxy:
        first, second = replicas.add(store_url=proxy.url), replicas.add()
        with load_on(first, second) as load:
            proxy.cut()
            until(lambda: leads(second), what="the failover")
            until(lambda: first.readyz()["role"] == "standby", what="the old leader's stepping down")
            [reason] = first.readyz()["reasons"]
            assert "does not answer; is it running, and is store.url right?" in reason
            assert problem(first.ask("c")).code == "not_leader"
            goes_on(load)
            proxy.heal()
            until(lambda: first.readyz()["reasons"] == [f"standby: {second.url} leads"], what="the way back")
        nothing_is_lost(load, first, second)


# ---- the store dies ---------------------------------------------------------------------------------------------


def test_a_store_that_is_killed_and_started_again_loses_nothing(replicas: Replicas, redis: RedisServer) -> None:
    first, second = replicas.add(), replicas.add()
    with load_on(first, second) as load:
        redis.kill()
        until(lambda: not first.readyz()["ready"] and not second.readyz()["ready"], what="the outage")
        until(lambda: "does not answer" in " ".join(second.readyz()["reasons"]), what="the reason")
        redis.start()
        until(lambda: leads(first) or leads(second), what="a leader")
        goes_on(load)
    nothing_is_lost(load, first, second)


def test_a_store_that_lost_its_data_gets_the_leases_back_by_their_tokens(
    replicas: Replicas, redis: RedisServer, tmp_path: Path
) -> None:
    first, second = replicas.add(), replicas.add()
    grants = [first.grant(f"c{number}") for number in range(8)]
    redis.kill()
    for folder in tmp_path.glob("appendonlydir"):
        for part in folder.iterdir():
            part.unlink()
    redis.start()
    # The old leader may still call itself one for a moment, until it finds its lock gone, and what it says then counts
    # for nothing; so ask until the leases stand in the store.
    store = RedisStore(StoreTable(kind="redis", url=redis.url))
    until(
        lambda: renewed([first, second], grants) == {"ok"} and len(store.lease_rows()) == 8,
        what="the leases in the store",
    )
    assert {row.split('"')[1] for row in store.lease_rows().values()} == {grant.lease_id for grant in grants}
    store.close()


# ---- the client -------------------------------------------------------------------------------------------------


def test_running_conversations_see_no_error_through_a_failover(replicas: Replicas, fleet: EmulatedFleet) -> None:
    first, second = replicas.add(), replicas.add()
    turns = TurnCollector()
    with ConServe(f"{first.url},{second.url}", on_turn=[turns]) as conserve:
        client = conserve.openai_client()
        histories: dict[str, list[dict[str, str]]] = {}

        def turn(name: str) -> None:
            messages = histories.setdefault(name, [{"role": "user", "content": f"{name}: hello " * 50}])
            with conversation(name):
                answer = client.chat.completions.create(model="emulated", messages=messages, max_tokens=8)
            messages += [
                {"role": "assistant", "content": answer.choices[0].message.content or ""},
                {"role": "user", "content": "go on"},
            ]

        running = [f"run-{number}" for number in range(6)]
        for name in running:
            turn(name)
        first.kill()
        for _ in range(5):  # while nobody leads, and across the failover
            for name in running:
                turn(name)
        turn("new during the failover")
        until(lambda: leads(second), what="the failover")
        for name in [*running, "new after the failover"]:
            turn(name)
        assert conserve.flush(20)
    failed = [record for record in turns.records if record.error]
    assert failed == []
    by_name = {name: {r.lease_id for r in turns.records if r.conversation_id == name} for name in running}
    assert {len(leases) for leases in by_name.values()} == {1}, "the same lease before, during and after"
    assert second.metric("conserve_lease_readopted_total") == 0


def test_a_client_finds_the_leader_among_standbys(replicas: Replicas) -> None:
    first, second, third = replicas.add(), replicas.add(), replicas.add()
    turns = TurnCollector()
    with ConServe(f"{third.url},{second.url},{first.url}", on_turn=[turns]) as conserve, conversation("c"):
        conserve.openai_client().chat.completions.create(
            model="emulated", messages=[{"role": "user", "content": "hello " * 200}], max_tokens=4
        )
        assert conserve.flush(20), "reports find the leader, too"
    [record] = turns.records
    assert (record.error, record.loss) == ("", "")
    assert record.lease_id is not None
    assert first.metric("conserve_lease_granted_total") == 1

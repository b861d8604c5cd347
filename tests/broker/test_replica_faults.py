"""A replica in this process on a real store: what it does when its own process, not the store, is at fault."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from conserve_broker._config_tables import StoreTable
from conserve_broker.clock import ResponsiveLoop
from conserve_broker.journal import EngineRow, Journal
from conserve_broker.redis_store import RedisStore
from conserve_broker.replica import Replica
from conserve_sdk.core import Broker, BrokerSettings

from .broker_process import until
from .redis_server import NEEDS_SERVER, RedisServer

pytestmark = NEEDS_SERVER


class Loop(ResponsiveLoop):
    """An event loop that hangs when a test says so."""

    def __init__(self) -> None:
        super().__init__(lambda callback: callback())
        self.hangs = False

    def responds(self) -> bool:
        return not self.hangs


class Candidate:
    """A replica and what it was told."""

    def __init__(self, settings: StoreTable) -> None:
        self.loop = Loop()
        self.journals: list[Journal] = []
        self.reasons: list[str] = []
        self.replica = Replica(
            lambda: RedisStore(settings),
            new_core=lambda: Broker(BrokerSettings()),
            url="http://me:7070",
            elected=lambda journal, _: self.journals.append(journal),
            deposed=self.reasons.append,
            loop=self.loop,
        )

    def end(self) -> None:
        self.replica.stop()
        for journal in self.journals:
            journal.abandon()


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[StoreTable]:
    with RedisServer(tmp_path) as server:
        yield StoreTable(kind="redis", url=server.url, lock_ttl_ms=600)


@pytest.fixture
def candidate(settings: StoreTable) -> Iterator[Candidate]:
    one = Candidate(settings)
    one.replica.start()
    until(one.replica.leads, what="the leadership")
    yield one
    one.end()


def test_a_leader_that_hangs_lets_another_one_lead(candidate: Candidate, settings: StoreTable) -> None:
    candidate.loop.hangs = True
    until(lambda: candidate.reasons == ["the broker hangs and lets another one lead"], what="the stepping down")
    assert not candidate.replica.leads()
    until(lambda: "does not run for leadership" in candidate.replica.failure, what="the abstention")
    other = Candidate(settings)
    other.replica.start()
    until(other.replica.leads, what="the other's leadership")
    candidate.loop.hangs = False
    until(lambda: candidate.replica.leader_url == "http://me:7070" and not candidate.replica.failure)
    other.end()


def test_a_lock_taken_away_is_noticed_at_the_next_write(candidate: Candidate, settings: StoreTable) -> None:
    thief = RedisStore(settings)
    thief._redis.set(thief._keys["lock"], "99 nonce http://thief:7070", px=60_000)
    [journal] = candidate.journals
    failed = journal.submit([EngineRow("e1", "[1]")])
    assert "does not lead any more" in str(failed.exception(20))
    assert not candidate.replica.leads(), "at once, before the next renewal"
    until(lambda: candidate.replica.leader_url == "http://thief:7070", what="the new leader's address")
    assert candidate.reasons == ["the lock was lost to another broker, or ran out"]
    assert thief.engines() == []
    thief.close()


def test_a_fault_of_its_own_does_not_end_it(candidate: Candidate, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = threading.Event()

    def renew(*_: object) -> bool:
        if broken.is_set():
            return True
        broken.set()
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(candidate.replica._store, "renew", renew)
    until(lambda: any("a mistake of ours" in reason for reason in candidate.reasons), what="the fault")
    until(lambda: len(candidate.journals) == 2 and candidate.replica.leads(), what="the next leadership")


def test_rows_of_another_version_keep_it_from_leading(settings: StoreTable) -> None:
    store = RedisStore(settings)
    store._redis.hset(store._keys["leases"], "l1", "[1, 2]")
    one = Candidate(settings)
    one.replica.start()
    until(lambda: "holds a lease of an unknown form" in one.replica.failure, what="the reason")
    assert not one.replica.leads()
    store._redis.hdel(store._keys["leases"], "l1")
    until(one.replica.leads, what="the leadership")
    one.end()
    store.close()

"""A broker process killed at random instants under real load, again and again: what it acknowledged is there."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conserve_broker.journal import Journal
from conserve_lab.emulator import EmulatedFleet, default_fleet

from .broker_process import BrokerProcess, Load, until

LIVES = 15
SEED = int(os.environ.get("CONSERVE_CRASH_SEED", "20261125"))


@pytest.fixture(scope="module")
def fleet() -> Iterator[EmulatedFleet]:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0)) as running:
        yield running


@pytest.mark.timeout(170)
def test_fifteen_lives(tmp_path: Path, fleet: EmulatedFleet) -> None:
    print(f"CONSERVE_CRASH_SEED={SEED}")
    chance = random.Random(SEED)
    tables = {
        "listen": {"port": 0},
        "scrape": {"interval_ms": 100},
        "journal": {"path": "leases.db"},
        "engine": fleet.broker_engines(),
    }
    broker = BrokerProcess(tmp_path / "broker.toml", tables)
    held: dict[str, str] = {}
    released: set[str] = set()
    unsure: set[str] = set()
    for life in range(LIVES):
        with broker:
            until(lambda: broker.readyz()["ready"], what="readiness")
            load = Load(broker.url, prefix=f"life-{life}").start()
            try:
                until(lambda load=load: load.grants > 0, what="a grant")
                time.sleep(chance.uniform(0.0, 0.4))  # the instant of death; nothing depends on how much was done
                broker.kill()
            finally:
                load.stop()
        held |= {name: grant.lease_id for name, grant in load.held.items()}
        released |= load.released
        unsure |= load.unsure
        _replayed(tmp_path / "leases.db", held=held, released=released, unsure=unsure)
    assert len(held) >= LIVES / 2


def _replayed(path: Path, *, held: dict[str, str], released: set[str], unsure: set[str]) -> None:
    """What the next life finds, read as it reads it."""
    journal = Journal.open(path)
    leases = journal.load().leases
    journal.close()
    found = {str(lease.key.conversation_id): str(lease.lease_id) for lease in leases}
    assert len(found) == len(leases), "no key is held twice"
    certain = {name: lease_id for name, lease_id in held.items() if name not in unsure}
    assert certain.items() <= found.items(), "every acknowledged lease is there"
    assert not released & set(found.values()), "every acknowledged end, too"
    assert set(found) <= set(held) | unsure, "and nothing that nobody asked for"


def test_the_next_life_serves_what_the_last_one_promised(tmp_path: Path, fleet: EmulatedFleet) -> None:
    tables = {
        "listen": {"port": 0},
        "scrape": {"interval_ms": 100},
        "journal": {"path": "leases.db"},
        "engine": fleet.broker_engines(),
    }
    with BrokerProcess(tmp_path / "broker.toml", tables) as broker:
        until(lambda: broker.readyz()["ready"], what="readiness")
        load = Load(broker.url).start()
        try:
            until(lambda: load.grants > 20, what="the load")
            broker.kill()
            broker.start()
            before = load.grants
            until(lambda: load.grants > before + 20, what="grants in the next life")
        finally:
            load.stop()
        certain = {name: grant for name, grant in load.held.items() if name not in load.unsure}
        assert set(broker.renew(*certain.values())) == {"ok"}
        again = broker.grant(next(iter(certain)))
        assert (again.reused, again.epoch) == (True, 1)
        assert broker.metric("conserve_lease_readopted_total") == 0

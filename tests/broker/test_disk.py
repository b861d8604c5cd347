"""Disks that fill up, turn read-only or rot, under a real broker: conversations go on, new ones hear why not, and the
broker recovers by itself."""

import resource
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from conserve_broker.journal import Journal
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk.protocol import LeaseGrant, Problem

from .broker_process import BrokerProcess, until


@pytest.fixture(scope="module")
def fleet() -> Iterator[EmulatedFleet]:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0)) as running:
        yield running


@pytest.fixture
def broker(tmp_path: Path, fleet: EmulatedFleet) -> Iterator[BrokerProcess]:
    tables = {
        "listen": {"port": 0},
        "scrape": {"interval_ms": 100},
        "journal": {"path": "leases.db"},
        "engine": fleet.broker_engines(),
    }
    with BrokerProcess(tmp_path / "broker.toml", tables) as running:
        until(lambda: all(engine.state == "ready" for engine in running.fleet().engines), what="the fleet")
        yield running


def report(broker: BrokerProcess, grant: LeaseGrant, *, tokens: int) -> str:
    body = {"reports": [{"kind": "turn_finished", "token": grant.token, "prompt_tokens": tokens}]}
    return httpx2.post(f"{broker.url}/v1/reports", json=body, timeout=20).json()["results"][0]["verdict"]


def refusal(broker: BrokerProcess, conversation: str) -> Problem:
    """The first refusal; a full file may still have room on the one page or the other."""
    responses = (broker.ask(f"{conversation}-{number}") for number in range(500))
    response = next(response for response in responses if not response.is_success)
    assert response.status_code == 503, response.text
    assert int(response.headers["retry-after"]) >= 1
    return Problem.model_validate_json(response.content)


def goes_on_without_its_journal(broker: BrokerProcess, grants: list[LeaseGrant], why: str) -> None:
    """What holds while the disk is at fault."""
    found = refusal(broker, "refused")
    assert (found.code, why in found.detail) == ("journal_failed", True), found
    until(lambda: not broker.readyz()["ready"], what="not ready")
    [reason] = broker.readyz()["reasons"]
    assert reason.startswith("no new leases: journal ")
    assert why in reason
    assert broker.renew(*grants) == ["ok"] * len(grants)
    assert [report(broker, grant, tokens=2_000) for grant in grants] == ["ok"] * len(grants)
    assert httpx2.get(f"{broker.url}/healthz").status_code == 200


def test_a_disk_without_room(broker: BrokerProcess, tmp_path: Path) -> None:
    grants = [broker.grant(f"c{number}") for number in range(4)]
    assert broker.process is not None
    written = (tmp_path / "leases.db-wal").stat().st_size
    resource.prlimit(broker.process.pid, resource.RLIMIT_FSIZE, (written, resource.RLIM_INFINITY))
    goes_on_without_its_journal(broker, grants, "cannot be written (disk full, over its quota, or failing)")
    resource.prlimit(broker.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    until(lambda: broker.readyz()["ready"], what="the recovery")
    grants.append(broker.grant("new"))
    broker.kill()
    broker.start()
    assert broker.renew(*grants) == ["ok"] * 5
    ledger = sorted(engine.kv_leased_tokens for engine in broker.fleet().engines)
    assert sum(ledger) == 4 * 2_000 + 100, "what was reported meanwhile was written when there was room"
    assert broker.metric("conserve_lease_readopted_total") == 0


@pytest.mark.parametrize(
    ("break_it", "mend_it", "why"),
    [
        ("max_page_count = 1", "max_page_count = 1000000", "the disk is full; free some space"),
        ("query_only = 1", "query_only = 0", "cannot be written; make the file and its folder writable"),
    ],
    ids=["full", "read-only"],
)
def test_what_sqlite_says_of_its_disk(
    tmp_path: Path, fleet: EmulatedFleet, break_it: str, mend_it: str, why: str
) -> None:
    journal = Journal.open(tmp_path / "leases.db")
    config = BrokerConfig.from_mapping(
        {"listen": {"port": 0}, "scrape": {"interval_ms": 100}, "engine": fleet.broker_engines()}
    )
    with BrokerServer(config, journal=journal) as server:
        server.wait_until_ready(engines=3)
        broker = BrokerProcess(tmp_path / "unused", {})
        broker.url = server.url
        grants = [broker.grant(f"c{number}") for number in range(20)]
        journal._file._db.execute(f"PRAGMA {break_it}")  # type: ignore[union-attr]
        goes_on_without_its_journal(broker, grants, why)
        journal._file._db.execute(f"PRAGMA {mend_it}")  # type: ignore[union-attr]
        until(lambda: broker.readyz()["ready"], what="the recovery")
        assert broker.grant("new").epoch == 1


def test_a_torn_tail_costs_nothing_acknowledged(broker: BrokerProcess, tmp_path: Path) -> None:
    grants = [broker.grant(f"c{number}") for number in range(6)]
    broker.kill()
    log = tmp_path / "leases.db-wal"
    content = log.read_bytes()
    log.write_bytes(content + content[32 : 32 + 3_000] + b"\xff" * 5_000)  # half a frame, and what the disk had there
    broker.start()
    assert broker.renew(*grants) == ["ok"] * 6
    assert broker.metric("conserve_lease_readopted_total") == 0
    assert broker.metric("conserve_leases_active") == 6


def test_a_rotten_file(broker: BrokerProcess, tmp_path: Path) -> None:
    grants = [broker.grant(f"c{number}") for number in range(40)]
    broker.signal(15)
    broker.wait()  # in good order, so that everything is in the one file
    path = tmp_path / "leases.db"
    content = bytearray(path.read_bytes())
    for page in range(1, len(content) // 4096):
        content[page * 4096 : page * 4096 + 512] = b"\xff" * 512
    path.write_bytes(content)
    broker.start()
    until(lambda: all(engine.state == "ready" for engine in broker.fleet().engines), what="the fleet")
    assert broker.metric("conserve_leases_active") == 0
    goes_on_without_its_journal(broker, grants[:4], "is damaged")
    assert "move it away to start with an empty one" in broker.readyz()["reasons"][0]
    assert broker.metric("conserve_lease_readopted_total") == 4
    path.rename(tmp_path / "rotten.db")
    until(lambda: broker.readyz()["ready"], what="the recovery")
    broker.grant("new")
    until(lambda: any("journal_rewritten" in line for line in broker.log), what="the new file")
    assert broker.renew(*grants[4:]) == ["ok"] * 36
    broker.kill()
    broker.start()
    assert broker.metric("conserve_leases_active") == 41, "the new file holds them all"

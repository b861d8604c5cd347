"""A real broker over real (emulated) engines on loopback: life, death, and what survives it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from conserve_broker.scrape import Scraper
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig, ConfigProblem, load_config
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk.protocol import BatchAnswer, FleetInfo, LeaseGrant, Problem

BUDGET_S = 40.0


@pytest.fixture(scope="module")
def fleet() -> Iterator[EmulatedFleet]:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0)) as running:
        yield running


def config_of(fleet: EmulatedFleet, **tables: Any) -> BrokerConfig:
    tables = {
        "listen": {"port": 0},
        "placement": {"preset": "paper"},
        "scrape": {"interval_ms": 100},
        "engine": fleet.broker_engines(),
        **tables,
    }
    return BrokerConfig.from_mapping(tables)


class Client:
    def __init__(self, url: str) -> None:
        self.http = httpx2.Client(base_url=url, timeout=BUDGET_S)

    def ask(self, conversation: str, *, tokens: int = 1_000, wait_ms: int = 0) -> httpx2.Response:
        body = {
            "conversation_id": conversation,
            "lineage": "main",
            "model": "emulated",
            "first_turn_input_tokens": tokens,
            "wait_ms": wait_ms,
        }
        return self.http.post("/v1/leases", json=body)

    def grant(self, conversation: str, *, tokens: int = 1_000) -> LeaseGrant:
        response = self.ask(conversation, tokens=tokens)
        assert response.is_success, response.text
        return LeaseGrant.model_validate_json(response.content)

    def turn(self, grant: LeaseGrant, *, tokens: int) -> BatchAnswer:
        report = {"kind": "turn_finished", "token": grant.token, "prompt_tokens": tokens, "migrated": True}
        response = self.http.post("/v1/reports", json={"reports": [report]})
        return BatchAnswer.model_validate_json(response.content)

    def verdicts(self, *grants: LeaseGrant) -> list[str]:
        response = self.http.post("/v1/renewals", json={"tokens": [grant.token for grant in grants]})
        return [status.verdict for status in BatchAnswer.model_validate_json(response.content).results]

    def fleet(self) -> FleetInfo:
        return FleetInfo.model_validate_json(self.http.get("/v1/fleet").content)

    def ledger(self) -> dict[str, int]:
        return {engine.engine_id: engine.kv_leased_tokens for engine in self.fleet().engines}


Connect = Callable[[str], Client]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes clients that are closed after the test."""
    with contextlib.ExitStack() as stack:

        def made(url: str) -> Client:
            client = Client(url)
            stack.enter_context(client.http)
            return client

        yield made


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BUDGET_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


# ---- life -------------------------------------------------------------------------------------------------------


def test_it_serves_leases_on_engines_it_watches(connect: Connect, fleet: EmulatedFleet) -> None:
    with BrokerServer(config_of(fleet)) as server:
        server.wait_until_ready(engines=3, timeout_s=BUDGET_S)
        client = connect(server.url)
        grant = client.grant("c")
        assert (grant.mode, grant.prefiller is not None) == ("migrate", True)
        urls = {engine.id: engine.url for engine in fleet.engines}
        assert grant.decoder.url == urls[grant.decoder.engine_id]
        engines = client.fleet().engines
        assert {engine.kv_capacity_tokens for engine in engines} == {65_536}
        assert client.http.get("/readyz").status_code == 200
        assert "conserve_lease_granted_total 1.0" in client.http.get("/metrics").text


def test_it_cannot_be_started_twice_and_has_no_url_before(fleet: EmulatedFleet) -> None:
    others = set(threading.enumerate())  # of brokers that tests before left to their fixtures
    server = BrokerServer(config_of(fleet))
    with pytest.raises(RuntimeError, match="start it first"):
        _ = server.url
    with pytest.raises(RuntimeError, match="start it first"):
        server.wait_until_ready()
    with server:
        with pytest.raises(RuntimeError, match="runs already"):
            server.start()
        server.stop()
        server.stop()
    left = set(threading.enumerate()) - others
    assert not [thread for thread in left if thread.name == "conserve-broker"]


def test_a_taken_port_is_named(fleet: EmulatedFleet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigProblem, match=rf"cannot bind 127.0.0.1:{port}.*choose another listen.port"):
            BrokerServer(config_of(fleet, listen={"port": port})).start()


def test_a_journal_that_cannot_be_used_frees_the_port(connect: Connect, fleet: EmulatedFleet, tmp_path: Path) -> None:
    broken = tmp_path / "journal.db"
    broken.write_bytes(b"this is no journal" * 100)
    server = BrokerServer(config_of(fleet, journal={"path": str(broken)}))
    with pytest.raises(Exception, match="journal"):
        server.start()
    broken.unlink()
    with server:
        assert connect(server.url).http.get("/healthz").status_code == 200


def test_ipv6_addresses_stand_in_brackets(connect: Connect, fleet: EmulatedFleet) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with BrokerServer(config_of(fleet, listen={"host": "::1", "port": 0})) as server:
        assert server.url.startswith("http://[::1]:")
        assert connect(server.url).http.get("/healthz").status_code == 200


def test_not_ready_in_time_says_why(connect: Connect, fleet: EmulatedFleet) -> None:
    dead = [{"id": "d0", "url": "http://127.0.0.1:9", "role": "decoder", "model": "emulated"}]
    with BrokerServer(config_of(fleet, engine=dead, placement={"preset": "affinity"})) as server:
        with pytest.raises(TimeoutError, match=r"0 of 1 engines are ready \(no engine is ready"):
            server.wait_until_ready(timeout_s=0.05)
        until(lambda: "Errno 111" in connect(server.url).fleet().engines[0].detail)


def test_stopping_answers_who_waits(connect: Connect, fleet: EmulatedFleet) -> None:
    with BrokerServer(config_of(fleet)) as server:
        server.wait_until_ready(engines=3, timeout_s=BUDGET_S)
        waiting = occupy_and_wait(server, connect)
        server.stop()
        [response] = waiting()
    assert isinstance(response, httpx2.Response)
    assert Problem.model_validate_json(response.content).code == "shutting_down"


def test_a_client_that_leaves_leaves_the_queue(connect: Connect, fleet: EmulatedFleet) -> None:
    with BrokerServer(config_of(fleet)) as server:
        server.wait_until_ready(engines=3, timeout_s=BUDGET_S)
        client = connect(server.url)
        for engine_id in ("d0", "d1"):
            client.http.post(f"/v1/engines/{engine_id}/drain")
        host, port = server.url.removeprefix("http://").split(":")
        body = b'{"conversation_id": "c", "lineage": "main", "model": "emulated", "wait_ms": 60000}'
        head = f"POST /v1/leases HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as impatient:
            impatient.sendall(head.encode() + body)
            until(lambda: client.fleet().waiting_requests == 1)
        until(lambda: client.fleet().waiting_requests == 0)


def occupy_and_wait(server: BrokerServer, connect: Connect) -> Callable[[], list[httpx2.Response | Exception]]:
    """One request that waits for admission, in a thread; returns how to get its end."""
    client = connect(server.url)
    for engine_id in ("d0", "d1"):
        client.http.post(f"/v1/engines/{engine_id}/drain")
    ends: list[httpx2.Response | Exception] = []

    def wait() -> None:
        try:
            ends.append(connect(server.url).ask("late", wait_ms=60_000))
        except httpx2.TransportError as fault:
            ends.append(fault)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: client.fleet().waiting_requests == 1)

    def end() -> list[httpx2.Response | Exception]:
        thread.join(BUDGET_S)
        return ends

    return end


# ---- death and what survives it ---------------------------------------------------------------------------------


def test_leases_survive_a_crash_in_mid_run(connect: Connect, fleet: EmulatedFleet, tmp_path: Path) -> None:
    config = config_of(fleet, journal={"path": str(tmp_path / "journal.db")})
    server = BrokerServer(config).start()
    try:
        server.wait_until_ready(engines=3, timeout_s=BUDGET_S)
        client = connect(server.url)
        grants = [client.grant(f"c{number}", tokens=1_000 + number) for number in range(8)]
        for grant in grants[:4]:
            assert client.turn(grant, tokens=5_000).results[0].verdict == "ok"
        released = grants.pop()
        client.http.delete(f"/v1/leases/{released.lease_id}", headers={"authorization": f"Lease {released.token}"})
        ledger, url = client.ledger(), server.url
        waiting = occupy_and_wait(server, connect)
        server.kill()
        [end] = waiting()
        assert isinstance(end, httpx2.TransportError), "nobody is answered by a crash"
        with pytest.raises(httpx2.ConnectError):
            client.fleet()
        server.start()
        assert server.url == url
        client = connect(url)
        assert client.ledger() == ledger
        assert sum(ledger.values()) == 4 * 5_000 + 1_004 + 1_005 + 1_006
        assert client.verdicts(*grants) == ["ok"] * 7
        assert client.fleet().leases == 7, "the released one stays released"
        again = client.grant("c0")
        assert (again.lease_id, again.reused, again.migrations) == (grants[0].lease_id, True, 1)
        states = {engine.engine_id: engine.draining for engine in client.fleet().engines}
        assert states == {"d0": True, "d1": True, "p0": False}
    finally:
        server.stop()


def test_a_crash_without_a_journal_file_is_healed_by_tokens(
    connect: Connect, fleet: EmulatedFleet, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.db"
    server = BrokerServer(config_of(fleet, journal={"path": str(journal)})).start()
    try:
        server.wait_until_ready(engines=3, timeout_s=BUDGET_S)
        client = connect(server.url)
        grants = [client.grant(f"c{number}") for number in range(3)]
        ledger = client.ledger()
        server.kill()
        for part in tmp_path.glob("journal.db*"):
            if part.suffix != ".key":
                part.unlink()
        server.start()
        client = connect(server.url)
        assert sum(client.ledger().values()) == 0
        assert client.verdicts(*grants) == ["ok"] * 3, "even before the first scrape"
        assert client.ledger() == ledger
        server.wait_until_ready(engines=3, timeout_s=BUDGET_S)
        assert client.verdicts(*grants) == ["ok"] * 3, "the engines are the same incarnations"
        assert [client.grant(f"c{number}").lease_id for number in range(3)] == [grant.lease_id for grant in grants]
    finally:
        server.stop()


def test_a_restarted_decoder_loses_its_leases_and_a_new_one_goes_elsewhere(connect: Connect) -> None:
    with (
        EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0)) as fleet,
        BrokerServer(config_of(fleet)) as server,
    ):
        server.wait_until_ready(engines=3, timeout_s=BUDGET_S)
        client = connect(server.url)
        grant = client.grant("c")
        fleet.restart(grant.decoder.engine_id)
        until(lambda: client.verdicts(grant) == ["engine_lost"])
        body = {"token": grant.token, "epoch": 1, "reason": "decoder restarted"}
        response = client.http.post(f"/v1/leases/{grant.lease_id}/supersede", json=body)
        assert LeaseGrant.model_validate_json(response.content).epoch == 2


def test_a_broker_that_lost_sight_of_its_engines_does_not_go_on(
    fleet: EmulatedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: Scraper) -> None:
        raise RuntimeError("the scraper fell over")

    monkeypatch.setattr(Scraper, "run", broken)
    with pytest.raises(RuntimeError, match="fell over"):
        BrokerServer(config_of(fleet)).serve_forever()


# ---- the configuration file -------------------------------------------------------------------------------------


def write_config(path: Path, fleet: EmulatedFleet, *, engines: int, port: int = 0) -> None:
    tables = [
        "[[engine]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in engine.items())
        for engine in fleet.broker_engines()[:engines]
    ]
    lines = [f"[listen]\nport = {port}\n[scrape]\ninterval_ms = 100\n[journal]\npath = 'journal.db'\n", *tables]
    fresh = path.with_suffix(".new")
    fresh.write_text("\n".join(lines))
    fresh.replace(path)


def test_a_changed_file_changes_the_fleet(connect: Connect, fleet: EmulatedFleet, tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    write_config(path, fleet, engines=2)
    with BrokerServer(load_config(path), config_path=path) as server:
        server.wait_until_ready(engines=2, timeout_s=BUDGET_S)
        client = connect(server.url)
        write_config(path, fleet, engines=3)
        until(lambda: len(client.fleet().engines) == 3)
        server.wait_until_ready(engines=3, timeout_s=BUDGET_S)
        path.write_text("[listen]\nprot = 1\n")
        until(lambda: client.http.get("/readyz").json()["warnings"] != [])
        assert "prot" in client.http.get("/readyz").json()["warnings"][0]
        assert len(client.fleet().engines) == 3, "a wrong file changes nothing"


# ---- a process of its own ---------------------------------------------------------------------------------------


def spawn(path: Path) -> subprocess.Popen[str]:
    code = "import sys; from conserve_broker.cli import broker_main; sys.exit(broker_main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, "--config", str(path)], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )


def started_url(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if "broker_started" in line:
            return line.split("url='")[1].split("'")[0]
    raise AssertionError("the broker ended before it served")


def test_the_command_serves_survives_kill_9_and_ends_on_sigterm(
    connect: Connect, fleet: EmulatedFleet, tmp_path: Path
) -> None:
    path = tmp_path / "broker.toml"
    write_config(path, fleet, engines=3)
    first = spawn(path)
    try:
        url = started_url(first)
        client = connect(url)
        until(lambda: all(engine.state == "ready" for engine in client.fleet().engines))
        grant = client.grant("c", tokens=2_000)
        assert client.turn(grant, tokens=3_000).results[0].verdict == "ok"
        ledger = client.ledger()
    finally:
        first.kill()
        first.communicate(timeout=BUDGET_S)
    write_config(path, fleet, engines=3, port=int(url.rsplit(":", 1)[1]))
    second = spawn(path)
    try:
        assert started_url(second) == url
        client = connect(url)
        assert client.ledger() == ledger
        assert client.verdicts(grant) == ["ok"]
        second.send_signal(signal.SIGTERM)
        assert second.wait(timeout=BUDGET_S) == 0
    finally:
        second.kill()
        second.communicate(timeout=BUDGET_S)

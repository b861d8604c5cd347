"""Engines that come and go: found by a real DNS server on loopback, or registered by themselves over HTTP."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from conserve_broker._url_guard import UrlGuard
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig, ConfigProblem
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk.protocol import EngineInfo, LeaseGrant, Problem

from .broker_process import BrokerProcess, until
from .dns_server import DnsServer

QUICK = {"interval_ms": 100, "timeout_ms": 500, "suspect_after_ms": 400, "gone_after_ms": 1_500}
ENGINE = {"role": "both", "model": "emulated", "connector": "none"}


@pytest.fixture(scope="module")
def fleet() -> Iterator[EmulatedFleet]:
    with EmulatedFleet(default_fleet(prefillers=0, decoders=3, time_scale=0)) as running:
        yield running


@pytest.fixture
def dns() -> Iterator[DnsServer]:
    with DnsServer() as server:
        yield server


class Running(BrokerProcess):
    """A broker in this process, asked as the others are."""

    def __init__(self, server: BrokerServer) -> None:
        super().__init__(Path("unused"), {})
        self.server = server
        self.url = server.url

    def engines(self) -> dict[str, str]:
        return {engine.engine_id: engine.state for engine in self.fleet().engines}

    def release(self, grant: Any) -> None:
        held = {"authorization": f"Lease {grant.token}"}
        assert httpx2.delete(f"{self.url}/v1/leases/{grant.lease_id}", headers=held).status_code == 204

    def put(self, engine_id: str, **body: Any) -> httpx2.Response:
        return httpx2.put(f"{self.url}/v1/engines/{engine_id}", json={**ENGINE, "ttl_ms": 60_000, **body})


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a broker with these tables and the same journal."""
    with contextlib.ExitStack() as stack:

        def started(**tables: Any) -> Running:
            journal = {"path": str(tmp_path / "leases.db")}
            config = BrokerConfig.from_mapping({"listen": {"port": 0}, "scrape": QUICK, "journal": journal, **tables})
            return Running(stack.enter_context(BrokerServer(config)))

        yield started


def srv(*urls: str) -> list[str]:
    return [f"0 0 {urlsplit(url).port} localhost." for url in urls]


def by_dns(dns: DnsServer, **keys: Any) -> dict[str, Any]:
    entry = {"name": "decoders.fleet.test", "record": "SRV", **ENGINE, **keys}
    return {"refresh_ms": 100, "timeout_ms": 500, "nameservers": [dns.address], "dns": [entry]}


# ---- DNS --------------------------------------------------------------------------------------------------------


def test_srv_answers_are_engines_and_those_that_leave_drain_first(
    start: Start, dns: DnsServer, fleet: EmulatedFleet
) -> None:
    urls = [engine.url for engine in fleet.engines]
    name = ("decoders.fleet.test", "SRV")
    dns.zone[name] = srv(urls[0])
    broker = start(discovery=by_dns(dns))
    first = f"decoders-localhost-{urlsplit(urls[0]).port}"
    until(lambda: broker.engines() == {first: "ready"}, what="the first engine")
    grant = broker.grant("c")
    assert (grant.decoder.engine_id, grant.decoder.url) == (first, urls[0].replace("127.0.0.1", "localhost"))
    second = f"decoders-localhost-{urlsplit(urls[1]).port}"
    dns.zone[name] = srv(urls[1])
    until(lambda: broker.engines() == {first: "draining", second: "ready"}, what="the drain")
    assert broker.renew(grant) == ["ok"], "its lease lives on"
    assert broker.grant("d").decoder.engine_id == second
    dns.zone[name] = srv(urls[0], urls[1])
    until(lambda: broker.engines() == {first: "ready", second: "ready"}, what="the way back")
    dns.zone[name] = srv(urls[1])
    until(lambda: broker.engines()[first] == "draining", what="the drain")
    broker.release(grant)
    until(lambda: broker.engines() == {second: "ready"}, what="the end of the drain")


def test_a_resolver_that_fails_keeps_the_last_answer(start: Start, dns: DnsServer, fleet: EmulatedFleet) -> None:
    name = ("decoders.fleet.test", "SRV")
    dns.zone[name] = srv(fleet.engines[0].url)
    broker = start(discovery=by_dns(dns))
    until(lambda: list(broker.engines().values()) == ["ready"], what="the engine")
    for mode in ("servfail", "silent"):
        dns.mode = mode
        until(lambda: broker.readyz()["warnings"] != [], what="the warning")
        [warning] = broker.readyz()["warnings"]
        assert warning.startswith("discovery.dns: decoders.fleet.test: ")
        assert warning.endswith("the last answer holds")
        asked = dns.asked
        until(lambda asked=asked: dns.asked > asked + 2, what="more questions")
        assert list(broker.engines().values()) == ["ready"]
        dns.mode = "answer"
        until(lambda: broker.readyz()["warnings"] == [], what="the recovery")
    del dns.zone[name]  # "no such name" is an answer
    until(lambda: broker.engines() == {}, what="nobody is there")


def test_address_records_take_the_port_of_the_configuration(start: Start, dns: DnsServer, fleet: EmulatedFleet) -> None:
    port = urlsplit(fleet.engines[2].url).port
    dns.zone["decoders.fleet.test", "A"] = ["127.0.0.1"]
    broker = start(discovery=by_dns(dns, record="A", port=port, id="gpu"))
    until(lambda: broker.engines() == {f"gpu-127-0-0-1-{port}": "ready"}, what="the engine")
    dns.zone["decoders.fleet.test", "A"] = []  # the name is there, records of that kind are not
    until(lambda: broker.engines() == {}, what="nobody is there")


def test_what_dns_found_survives_a_restart_without_dns(start: Start, dns: DnsServer, fleet: EmulatedFleet) -> None:
    dns.zone["decoders.fleet.test", "SRV"] = srv(fleet.engines[0].url)
    broker = start(discovery=by_dns(dns))
    until(lambda: list(broker.engines().values()) == ["ready"], what="the engine")
    grant = broker.grant("c")
    broker.server.kill()
    dns.mode = "silent"
    broker.server.start()
    assert broker.renew(grant) == ["ok"]
    until(lambda: list(broker.engines().values()) == ["ready"], what="the engine")
    assert broker.metric("conserve_lease_readopted_total") == 0
    dns.mode = "answer"
    dns.zone["decoders.fleet.test", "SRV"] = srv(fleet.engines[1].url)
    until(lambda: sorted(broker.engines().values()) == ["draining", "ready"], what="the new answer")


def test_an_engine_of_the_file_is_not_taken_twice(start: Start, dns: DnsServer, fleet: EmulatedFleet) -> None:
    url = fleet.engines[0].url
    dns.zone["decoders.fleet.test", "A"] = ["127.0.0.1"]
    broker = start(
        discovery=by_dns(dns, record="A", port=urlsplit(url).port), engine=[{"id": "d0", "url": url, **ENGINE}]
    )
    until(lambda: dns.asked > 3, what="the questions")
    assert list(broker.engines()) == ["d0"]


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"record": "SRV", "port": 1}, "port: an SRV answer names its port"),
        ({"record": "A"}, "port: is missing; A answers are addresses only"),
        ({"record": "SRV", "role": "cook"}, "role: Input should be 'prefiller', 'decoder' or 'both'"),
        ({"record": "SRV", "conector": "none"}, "conector: Extra inputs are not permitted"),
        ({"record": "MX"}, "input should be 'A', 'AAAA' or 'SRV'"),
    ],
)
def test_mistakes_in_dns_tables_are_named(entry: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigProblem) as found:
        BrokerConfig.from_mapping({"discovery": {"dns": [{"name": "x.test", **ENGINE, **entry}]}})
    assert line in str(found.value)


def test_a_nameserver_that_is_no_address_is_named() -> None:
    config = BrokerConfig.from_mapping(
        {
            "listen": {"port": 0},
            "discovery": {"nameservers": ["1.2.3"], "dns": [{"name": "x.test", "record": "SRV", **ENGINE}]},
        }
    )
    with pytest.raises(ConfigProblem, match=r"discovery.nameservers: .* write addresses like"):
        BrokerServer(config).start()


def test_long_names_get_short_ids() -> None:
    config = BrokerConfig.from_mapping(
        {
            "discovery": {
                "dns": [
                    {"name": "x.test", "record": "SRV", **ENGINE},
                    {"name": "v6", "record": "AAAA", "port": 8000, **ENGINE},
                ]
            }
        }
    )
    srv_table, address_table = config.discovery.dns
    hosts = [f"{letter * 60}.very.long.example.test" for letter in "ab"]
    ids = {srv_table.engine(host, 8000).id for host in hosts} | {srv_table.engine(hosts[0], 8001).id}
    assert len(ids) == 3
    assert {len(engine_id) for engine_id in ids} == {64}
    assert address_table.engine("fd00::1", 8000).url == "http://[fd00::1]:8000"
    assert address_table.engine("fd00::1", 8000).id == "v6-fd00-1-8000"


# ---- registration -----------------------------------------------------------------------------------------------

ALLOW = {"allow": ["127.0.0.0/8"]}


def problem(response: httpx2.Response) -> Problem:
    assert response.headers["content-type"] == "application/problem+json"
    found = Problem.model_validate_json(response.content)
    assert found.status == response.status_code
    return found


def test_an_engine_registers_serves_and_leaves(start: Start, fleet: EmulatedFleet) -> None:
    broker = start(registration=ALLOW)
    assert broker.readyz()["reasons"] == ["no engine is ready: see /v1/engines"]
    first = broker.put("w0", url=fleet.engines[0].url)
    assert first.status_code == 201, first.text
    assert EngineInfo.model_validate_json(first.content).state == "unknown"
    until(lambda: broker.engines() == {"w0": "ready"}, what="the engine")
    again = broker.put("w0", url=fleet.engines[0].url)
    assert (again.status_code, EngineInfo.model_validate_json(again.content).state) == (200, "ready")
    grant = broker.grant("c")
    assert httpx2.delete(f"{broker.url}/v1/engines/w0").status_code == 204
    assert broker.engines() == {"w0": "draining"}
    assert broker.renew(grant) == ["ok"]
    broker.release(grant)
    until(lambda: broker.engines() == {}, what="the end of the drain")
    assert httpx2.delete(f"{broker.url}/v1/engines/w0").status_code == 204, "idempotent"


def test_an_engine_that_registers_anew_has_lost_its_leases(start: Start, fleet: EmulatedFleet) -> None:
    """The engine has not restarted in truth, so no scrape can have ended the lease."""
    broker = start(registration=ALLOW)
    broker.put("w0", url=fleet.engines[0].url)
    until(lambda: broker.engines() == {"w0": "ready"}, what="the engine")
    life = broker.fleet().engines[0].incarnation
    assert life is not None
    broker.put("w0", url=fleet.engines[0].url, incarnation=life)
    broker.put("w0", url=fleet.engines[0].url, incarnation=life)
    grant = broker.grant("c")
    assert broker.renew(grant) == ["ok"], "the same word again is a heartbeat"
    broker.put("w0", url=fleet.engines[0].url, incarnation=f"{life}9")
    assert broker.renew(grant) == ["engine_lost"]
    assert broker.metric("conserve_engine_restarts_total") == 1
    until(lambda: broker.engines() == {"w0": "ready"}, what="the next scrape")
    broker.put("w0", url=fleet.engines[0].url, incarnation=f"{life}9")
    assert broker.renew(broker.grant("d")) == ["ok"]


def test_an_engines_word_for_its_life_outlives_the_broker(start: Start, fleet: EmulatedFleet) -> None:
    broker = start(registration=ALLOW)
    broker.put("w0", url=fleet.engines[0].url)
    until(lambda: broker.engines() == {"w0": "ready"}, what="the engine")
    life = broker.fleet().engines[0].incarnation
    broker.put("w0", url=fleet.engines[0].url, incarnation=life)
    grant = broker.grant("c")
    broker.server.kill()
    broker.server.start()
    until(lambda: broker.engines() == {"w0": "ready"}, what="the engine")
    assert broker.renew(grant) == ["ok"]
    broker.put("w0", url=fleet.engines[0].url, incarnation=f"{life}9")
    assert broker.renew(grant) == ["engine_lost"]


def test_an_engine_registers_its_host_tier(start: Start, fleet: EmulatedFleet) -> None:
    broker = start(registration=ALLOW)
    broker.put("w0", url=fleet.engines[0].url, host_tier_tokens=65_536)
    assert broker.fleet().engines[0].host_tier_tokens == 65_536
    broker.put("w0", url=fleet.engines[0].url)
    assert broker.fleet().engines[0].host_tier_tokens == 0, "the last word counts"


def test_without_heartbeats_an_engine_is_suspect_then_gone(start: Start, fleet: EmulatedFleet) -> None:
    """Although its pages still answer: who stops talking may have been cut off from the agents, too."""
    broker = start(registration=ALLOW)
    broker.put("w0", url=fleet.engines[0].url, ttl_ms=1_000)
    until(lambda: broker.engines() == {"w0": "ready"}, what="the engine")
    grant = broker.grant("c")
    until(lambda: broker.engines() == {"w0": "suspect"}, what="the suspicion")
    assert broker.fleet().engines[0].detail == "no heartbeat for 1000 ms"
    assert broker.renew(grant) == ["ok"], "suspicion costs no lease"
    assert broker.put("w0", url=fleet.engines[0].url, ttl_ms=1_000).status_code == 200
    until(lambda: broker.engines() == {"w0": "ready"}, what="the trust")
    assert broker.renew(grant) == ["ok"]
    until(lambda: broker.engines() == {}, what="the end")
    assert broker.renew(grant) == ["engine_lost"]
    assert broker.put("w0", url=fleet.engines[0].url).status_code == 201, "it may come back"


def test_registrations_survive_a_restart(start: Start, fleet: EmulatedFleet) -> None:
    broker = start(registration=ALLOW)
    broker.put("w0", url=fleet.engines[0].url)
    until(lambda: broker.engines() == {"w0": "ready"}, what="the engine")
    grant = broker.grant("c")
    broker.server.kill()
    broker.server.start()
    assert broker.renew(grant) == ["ok"]
    until(lambda: broker.engines() == {"w0": "ready"}, what="the engine")
    assert broker.metric("conserve_lease_readopted_total") == 0
    assert broker.put("w0", url=fleet.engines[0].url).status_code == 200


def test_registration_is_off_unless_it_is_allowed(start: Start, fleet: EmulatedFleet) -> None:
    broker = start(engine=[{"id": "d0", "url": fleet.engines[0].url, **ENGINE}])
    found = problem(broker.put("w0", url=fleet.engines[1].url))
    assert (found.status, found.code) == (403, "registration_disabled")
    assert "[registration] allow" in found.detail
    assert problem(httpx2.delete(f"{broker.url}/v1/engines/d0")).code == "registration_disabled"
    assert list(broker.engines()) == ["d0"]


def test_what_may_not_register_is_told_why(start: Start, fleet: EmulatedFleet) -> None:
    file_engine = {"id": "d0", "url": fleet.engines[0].url, **ENGINE}
    broker = start(registration=ALLOW, engine=[file_engine])
    foreign = problem(broker.put("w0", url="http://169.254.169.254"))
    assert (foreign.status, foreign.code) == (403, "engine_not_allowed")
    named = problem(broker.put("w0", url="http://localhost:8000"))
    assert named.code == "engine_not_allowed", "a name is never resolved for the check"
    same_id = problem(broker.put("d0", url=fleet.engines[1].url))
    assert (same_id.status, same_id.code) == (409, "engine_conflict")
    same_url = problem(broker.put("w0", url=fleet.engines[0].url))
    assert (same_url.code, "is in use by engine d0" in same_url.detail) == ("engine_conflict", True)
    wrong = problem(broker.put("w 0", url=fleet.engines[1].url))
    assert (wrong.status, wrong.code) == (422, "bad_request")
    role = problem(broker.put("w0", url=fleet.engines[1].url, role="cook"))
    assert (role.status, "role" in role.detail) == (422, True)
    assert list(broker.engines()) == ["d0"]


def test_the_document_lists_both_routes(start: Start) -> None:
    document = httpx2.get(f"{start().url}/openapi.json").json()
    operations = document["paths"]["/v1/engines/{engine_id}"]
    assert {"get", "put", "delete"} <= set(operations)
    assert {"200", "201", "403", "409", "422"} <= set(operations["put"]["responses"])
    assert "application/problem+json" in operations["put"]["responses"]["403"]["content"]


class TestGuard:
    @pytest.mark.parametrize(
        ("allow", "url", "allowed"),
        [
            ("10.0.0.0/8", "http://10.1.2.3:8000", True),
            ("10.0.0.0/8", "http://11.1.2.3:8000", False),
            ("10.0.0.0/8", "http://ten.example", False),
            ("fd00::/8", "http://[fd00::1]:8000", True),
            ("http://*.internal:8000", "http://w0.internal:8000", True),
            ("http://*.internal:8000", "http://w0.internal:8001", False),
            ("http://*.internal:8000", "https://w0.internal:8000", False),
            ("http://*.internal:8000", "http://evil.test/x.internal:8000", False),
            ("http://*.internal:8000", "http://evil.test/", False),
            ("http://*.internal:*", "http://w0.internal:9", True),
            ("http://*", "http://w0.internal", True),
            ("http://10.0.0.0/8", "", None),
            ("10.0.0.1/8", "", None),
            ("workers", "", None),
        ],
    )
    def test_entries(self, allow: str, url: str, allowed: bool | None) -> None:
        if allowed is None:
            with pytest.raises(ConfigProblem, match="registration: allow:"):
                BrokerConfig.from_mapping({"registration": {"allow": [allow]}})
        else:
            assert UrlGuard([allow]).allows(url) is allowed

    def test_an_empty_list_allows_nothing(self) -> None:
        assert not UrlGuard([]).allows("http://10.0.0.1")


# ---- slow is not dead -------------------------------------------------------------------------------------------


def test_a_slow_engine_keeps_its_leases(start: Start, page_engines: Callable[[], Any]) -> None:
    """Its scrapes time out for a while: it is suspect and gets no new lease, but what it holds lives on."""
    slow, other = page_engines(), page_engines()
    keys = {"role": "both", "model": "conserve-tiny", "connector": "none"}
    quick = {**QUICK, "gone_after_ms": 60_000}
    engines = [{"id": "slow", "url": slow.url, **keys}, {"id": "zz", "url": other.url, **keys}]
    broker = start(engine=engines, scrape=quick)
    until(lambda: broker.engines() == {"slow": "ready", "zz": "ready"}, what="the engines")
    body = {"lineage": "main", "model": "conserve-tiny", "first_turn_input_tokens": 10}

    def grant(name: str) -> LeaseGrant:
        response = httpx2.post(f"{broker.url}/v1/leases", json={**body, "conversation_id": name})
        return LeaseGrant.model_validate_json(response.content)

    held = next(found for found in map(grant, "abcdefgh") if found.decoder.engine_id == "slow")
    slow.hang = True
    until(lambda: broker.engines()["slow"] == "suspect", what="the suspicion")
    assert {grant(name).decoder.engine_id for name in ("x", "y", "z")} == {"zz"}
    assert broker.renew(held) == ["ok"]
    slow.hang = False
    until(lambda: broker.engines()["slow"] == "ready", what="the trust")
    assert broker.renew(held) == ["ok"]
    assert grant(held.conversation_id).lease_id == held.lease_id

"""`conserve doctor` on the broker: one in memory, a running one with an emulated fleet, and nothing at all."""

import json
from importlib import metadata

import httpx2
import pytest

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.doctor import _command, _installation, main
from conserve_sdk.protocol import PROTOCOL_VERSION
from conserve_sdk.testing import EngineReply, InMemoryBroker, small_fleet


class Network(httpx2.BaseTransport):
    """A broker in memory with its probes, and engines that answer unless told otherwise."""

    def __init__(self, broker: InMemoryBroker) -> None:
        self.broker = broker
        self.ready = 200
        self.fleet_changes: dict = {}
        self.silent: set[str] = set()
        self.guards: dict[str, dict] = {}
        self.refuses = False
        self.authorization = ""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        host, path = request.url.host, request.url.path
        if host in self.silent:
            raise httpx2.ConnectTimeout("timed out", request=request)
        if path == "/conserve/engine" and host in self.guards:
            return httpx2.Response(200, json=self.guards[host])
        if host != "broker.invalid":
            return self.engine(path)
        self.authorization = request.headers.get("authorization", "")
        if self.refuses and path == "/v1/fleet":
            return httpx2.Response(401)
        if path in ("/healthz", "/readyz"):
            return httpx2.Response(200 if path == "/healthz" else self.ready)
        answer = self.broker.handle_request(request)
        changed = path == "/v1/fleet" and self.fleet_changes
        return httpx2.Response(200, json=answer.json() | changed) if changed else answer

    @staticmethod
    def engine(path: str) -> httpx2.Response:
        answers = {
            "/health": httpx2.Response(200),
            "/version": httpx2.Response(200, json={"version": "0.32.0"}),
            "/v1/models": httpx2.Response(
                200, json={"data": [{"id": "test-model", "root": "m", "max_model_len": 4096}]}
            ),
            "/metrics": httpx2.Response(200, text=PAGE),
        }
        return answers.get(path, httpx2.Response(404))


PAGE = """
vllm:num_requests_running 0.0
vllm:nixl_num_failed_transfers_total 0.0
vllm:cache_config_info{block_size="16",enable_prefix_caching="True"} 1.0
"""


@pytest.fixture
def network() -> Network:
    return Network(InMemoryBroker())


@pytest.fixture(autouse=True)
def no_broker_in_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("CONSERVE_BROKER_URL", raising=False)


@pytest.fixture(autouse=True)
def engines_in_this_process_are_elsewhere(monkeypatch) -> None:
    """What the emulated engines burn is the tests' own CPU time, and says nothing about an engine at rest."""
    monkeypatch.setattr(_command, "cpu_seconds_behind", lambda port: None)


def run(capsys, *argv: str, transport: httpx2.BaseTransport | None = None) -> tuple[int, list[str]]:
    code = main(list(argv), transport=transport, sleep=lambda _: None)
    return code, capsys.readouterr().out.splitlines()


def fails(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("fail")]


ASK = ("--broker", "http://broker.invalid/", "--no-requests")


def test_without_a_broker_it_reports_the_installation(capsys) -> None:
    code, lines = run(capsys)
    assert code == 0
    assert f"ok    conserve-sdk: {metadata.version('conserve-sdk')}" in lines
    assert "ok    extra lab: installed" in lines
    assert lines[-1] == "note  broker: not asked: give --broker URL, or the URLs of engines"


def test_a_missing_extra_says_how_to_install_it(capsys, monkeypatch) -> None:
    monkeypatch.setattr(_installation, "_extras", lambda: {"lab": ["no-such-distribution", "pydantic"]})
    code, lines = run(capsys)
    expected = "note  extra lab: not installed (no-such-distribution missing): pip install 'conserve-sdk[lab]'"
    assert (code, expected in lines) == (0, True)


def test_a_healthy_fleet(capsys, network: Network) -> None:
    code, lines = run(capsys, *ASK, transport=network)
    assert (code, fails(lines)) == (0, [])
    assert "ok    broker: ready at http://broker.invalid, preset default" in lines
    assert "note  engine d1: the broker sees it as decoder of test-model, ready; 0 of 100,000 KV tokens leased" in lines
    assert "ok    engine d1: answers at http://d1.invalid" in lines
    assert "ok    group test: blocks of 16 on all 3" in lines


def test_the_environment_names_the_broker(capsys, network: Network, monkeypatch) -> None:
    monkeypatch.setenv("CONSERVE_BROKER_URL", "http://broker.invalid, http://standby.invalid")
    assert (
        "ok    broker: ready at http://broker.invalid, preset default"
        in run(capsys, "--no-requests", transport=network)[1]
    )


def test_an_engine_the_broker_lost(capsys, network: Network) -> None:
    network.broker.fail_engine("d0")
    network.broker.clock.advance(5_000)
    code, lines = run(capsys, *ASK, transport=network)
    (line,) = fails(lines)
    assert code == 1
    assert line.startswith("fail  engine d0: decoder of test-model, suspect: ")


def test_an_engine_only_the_broker_reaches(capsys, network: Network) -> None:
    network.silent.add("p0.invalid")
    code, lines = run(capsys, *ASK, transport=network)
    (line,) = fails(lines)
    assert code == 1
    assert "the broker reaches it, this machine does not (ConnectTimeout: timed out)" in line


def test_a_broker_that_is_not_ready(capsys, network: Network) -> None:
    network.ready = 503
    code, lines = run(capsys, *ASK, transport=network)
    expected = "fail  broker: not ready at http://broker.invalid (/healthz 200, /readyz 503): see its log"
    assert (code, fails(lines)) == (1, [expected])


def test_a_broker_without_engines(capsys) -> None:
    code, lines = run(capsys, *ASK, transport=Network(InMemoryBroker(engines=[])))
    assert (code, fails(lines)) == (1, ["fail  engines: the broker knows none: name them in its configuration"])


@pytest.mark.parametrize(
    ("version", "older"), [(PROTOCOL_VERSION - 1, "the broker"), (PROTOCOL_VERSION + 1, "this SDK")]
)
def test_another_protocol_version(capsys, network: Network, version: int, older: str) -> None:
    network.fleet_changes = {"protocol_version": version}
    code, lines = run(capsys, *ASK, transport=network)
    (line,) = fails(lines)
    assert code == 1
    assert line.endswith(f"upgrade {older}")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            httpx2.Response(200, text="<html>"),
            "what answers at http://broker.invalid is not a ConServe broker: is this",
        ),
        (httpx2.Response(404), "no answer from http://broker.invalid (HTTPStatusError: "),
    ],
)
def test_something_else_on_that_port(capsys, answer: httpx2.Response, told: str) -> None:
    code, lines = run(capsys, *ASK, transport=httpx2.MockTransport(lambda _: answer))
    (line,) = fails(lines)
    assert code == 1
    assert told in line


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "no-url", "http://host:port"])
def test_nothing_there(capsys, url: str) -> None:
    code, lines = run(capsys, "--broker", url)
    (line,) = fails(lines)
    assert code == 1
    assert line.startswith(f"fail  broker: no answer from {url} (")


def test_a_broker_process_with_an_emulated_fleet(capsys) -> None:
    keys = ("id", "url", "role", "model", "connector", "transfer_group")
    with EmulatedFleet(time_scale=0) as fleet:
        engines = [{key: entry[key] for key in keys} for entry in fleet.broker_engines()]
        config = BrokerConfig.model_validate({"listen": {"port": 0}, "journal": {"path": ""}, "engine": engines})
        with BrokerServer(config) as broker:
            broker.wait_until_ready(engines=len(fleet.engines))
            code, lines = run(capsys, "--broker", broker.url)
            assert (code, fails(lines)) == (0, [])
            assert sum(": answers at http" in line for line in lines) == len(fleet.engines)
            assert sum("tokens came over" in line for line in lines) == 3
            assert lines[-1].startswith("ok    turn of emulated: by lease on d")
            assert len(small_fleet()) < len(fleet.engines)
            fleet.kill("d0")
            code, lines = run(capsys, "--broker", broker.url, "--no-requests")
            (line,) = fails(lines)
            assert code == 1
            assert line.startswith("fail  engine d0:")


def test_a_key_for_the_broker(capsys, network: Network) -> None:
    run(capsys, *ASK, "--broker-key", "tenant-key", transport=network)
    assert network.authorization == "Bearer tenant-key"
    network.refuses = True
    code, lines = run(capsys, *ASK, transport=network)
    (line,) = fails(lines)
    assert code == 1
    assert "refuses this key (HTTP 401): give the key of a tenant" in line


def test_a_turn_by_lease_that_fails(capsys, network: Network) -> None:
    code, lines = run(capsys, "--broker", "http://broker.invalid", transport=network)
    assert code == 1
    assert fails(lines)[-1].startswith("fail  turn of test-model: failed (NotFoundError: ")
    assert not network.broker.journal()  # given back


def test_a_turn_that_lost_its_way(capsys, network: Network, monkeypatch) -> None:
    answer = EngineReply.chat()

    def engine(path: str) -> httpx2.Response:
        if path == "/v1/chat/completions":
            return httpx2.Response(200, content=answer.chunks[0], headers={"content-type": answer.content_type})
        return Network.engine(path)

    monkeypatch.setattr(network, "engine", engine)
    _, lines = run(capsys, "--broker", "http://broker.invalid", "--engine-key", "k", transport=network)
    assert lines[-1].startswith("ok    turn of test-model: by lease on d0 (local), first token after ")
    network.broker = InMemoryBroker(settings=BrokerSettings(placement=PAPER))
    _, lines = run(capsys, "--broker", "http://broker.invalid", "--broker-key", "k", transport=network)
    assert lines[-1].startswith("fail  turn of test-model: answered, but not as it should be: no_transfer_params: see")


def test_json(capsys, network: Network) -> None:
    network.silent.add("p0.invalid")
    assert main([*ASK, "--json"], transport=network, sleep=lambda _: None) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    (failed,) = (finding for finding in report["findings"] if finding["verdict"] == "fail")
    assert {name: failed[name] for name in ("subject", "check", "fix")} == {
        "subject": "engine p0",
        "check": "reachable",
        "fix": "turns go to http://p0.invalid directly, open the way",
    }


def test_a_guard_under_another_name_refuses_every_lease(capsys, network: Network) -> None:
    network.guards = {"d0.invalid": {"engine_id": "d0"}, "d1.invalid": {"engine_id": "d9"}}
    code, lines = run(capsys, *ASK, transport=network)
    assert code == 1
    guards = [line for line in lines if "guard" in line]
    assert any(line.startswith("ok") and "engine d0" in line for line in guards)
    assert any(line.startswith("note") and "engine p0" in line and "no guard" in line for line in guards)
    (line,) = [line for line in fails(lines) if "guard" in line]
    assert "takes it for 'd9', the broker for 'd1'" in line
    assert "CONSERVE_GUARD_ENGINE_ID" in line

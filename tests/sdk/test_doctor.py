"""`conserve doctor`: against a fleet in memory, a running broker with an emulated fleet, and nothing at all."""

from importlib import metadata

import httpx2
import pytest

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet
from conserve_sdk import doctor
from conserve_sdk.protocol import PROTOCOL_VERSION
from conserve_sdk.testing import InMemoryBroker, small_fleet


class Network(httpx2.BaseTransport):
    """A broker in memory with its probes, and engines that answer unless told otherwise."""

    def __init__(self, broker: InMemoryBroker) -> None:
        self.broker = broker
        self.ready = 200
        self.fleet_changes: dict = {}
        self.silent: set[str] = set()
        self.guards: dict[str, object] = {}

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        host, path = request.url.host, request.url.path
        if host in self.silent:
            raise httpx2.ConnectTimeout("timed out", request=request)
        if path == "/conserve/engine" and host in self.guards:
            return httpx2.Response(200, json=self.guards[host])
        if host != "broker.invalid":
            return httpx2.Response(200 if path == "/health" else 404)
        if path in ("/healthz", "/readyz"):
            return httpx2.Response(200 if path == "/healthz" else self.ready)
        answer = self.broker.handle_request(request)
        return httpx2.Response(200, json=answer.json() | self.fleet_changes)


@pytest.fixture
def network() -> Network:
    return Network(InMemoryBroker())


@pytest.fixture(autouse=True)
def no_broker_in_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("CONSERVE_BROKER_URL", raising=False)


def run(capsys, *argv: str, transport: httpx2.BaseTransport | None = None) -> tuple[int, list[str]]:
    code = doctor.main(list(argv), transport=transport)
    return code, capsys.readouterr().out.splitlines()


def fails(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("fail")]


ASK = ("--broker", "http://broker.invalid/")


def test_without_a_broker_it_reports_the_installation(capsys) -> None:
    code, lines = run(capsys)
    assert code == 0
    assert f"ok    conserve-sdk: {metadata.version('conserve-sdk')}" in lines
    assert "ok    extra lab: installed" in lines
    assert lines[-1] == "note  broker: not asked: give --broker URL"


def test_a_missing_extra_says_how_to_install_it(capsys, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_extras", lambda: {"lab": ["no-such-distribution", "pydantic"]})
    code, lines = run(capsys)
    expected = "note  extra lab: not installed (no-such-distribution missing): pip install 'conserve-sdk[lab]'"
    assert (code, expected in lines) == (0, True)


def test_a_healthy_fleet(capsys, network: Network) -> None:
    code, lines = run(capsys, *ASK, transport=network)
    assert (code, fails(lines)) == (0, [])
    assert "ok    broker: ready at http://broker.invalid, preset default" in lines
    assert "ok    engine d1: decoder of test-model, ready; answers at http://d1.invalid" in lines


def test_the_environment_names_the_broker(capsys, network: Network, monkeypatch) -> None:
    monkeypatch.setenv("CONSERVE_BROKER_URL", "http://broker.invalid, http://standby.invalid")
    assert "ok    broker: ready at http://broker.invalid, preset default" in run(capsys, transport=network)[1]


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
        (httpx2.Response(200, text="<html>"), "what answers at http://broker.invalid is not a ConServe broker"),
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
            assert sum(line.startswith("ok    engine ") for line in lines) == len(fleet.engines)
            assert len(small_fleet()) < len(fleet.engines)
            fleet.kill("d0")
            code, lines = run(capsys, "--broker", broker.url)
            (line,) = fails(lines)
            assert code == 1
            assert line.startswith("fail  engine d0:")


GUARDS = {
    "none": (None, "note", "none: any client"),
    "something else": (["x"], "note", "none: any client"),
    "well": ({}, "ok", "lives as "),
    "another engine": ({"engine_id": "d9"}, "fail", "correct CONSERVE_GUARD_ENGINE_ID"),
    "another life": ({"incarnation": "started-1.00"}, "fail", "it refuses leases until they agree"),
    "policy": ({"kv_load_failure_policy": "fail"}, "note", "is not recompute"),
    "no cache": ({"prefix_caching": False}, "note", "no prefix cache"),
    "no details": ({"prompt_tokens_details": False}, "note", "no prompt token details"),
}


def _engines(network: Network) -> list:
    with httpx2.Client(transport=network.broker) as http:
        return list(http.get("http://broker.invalid/v1/fleet").json()["engines"])


@pytest.mark.parametrize(("change", "verdict", "text"), GUARDS.values(), ids=GUARDS)
def test_guards_are_asked_who_they_are(capsys, network: Network, change, verdict: str, text: str) -> None:
    engines = {engine["engine_id"]: engine for engine in _engines(network)}
    if change is not None:
        told = {"engine_id": "d1", "incarnation": engines["d1"]["incarnation"]}
        network.guards["d1.invalid"] = told | change if isinstance(change, dict) else change
    code, lines = run(capsys, *ASK, transport=network)
    (line,) = [line for line in lines if "guard of d1:" in line]
    assert line.startswith(verdict)
    assert text in line
    assert code == (verdict == "fail")

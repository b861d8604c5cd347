"""The program's key at the broker: where it comes from, where it must not go, and what a refusal looks like."""

import copy
import json
import logging
import pickle

import httpx2
import pytest

import conserve_sdk
from conserve_sdk import AccessDenied, ConfigError, ConServe, RateLimited
from conserve_sdk._broker_access import AccessFaultError, BrokerAccess
from conserve_sdk._registry import LeaseRegistry
from conserve_sdk._reporter import Reporter
from conserve_sdk.client import connect
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.errors import BrokerUnavailable
from conserve_sdk.protocol import TurnStartedReport
from conserve_sdk.testing import FakeClock, InMemoryBroker, ScriptedEngine

from .callers import REQUEST, Colour, Script, granted, problem

SECRET = "csk.red-1.0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"
VARIABLES = ("API_KEY", "API_KEY_FILE", "CA", "CERT", "CERT_KEY")


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(f"CONSERVE_BROKER_{name}", raising=False)


# ---- where it comes from ----------------------------------------------------------------------------------------


def test_argument_over_variable_over_file(monkeypatch, tmp_path):
    assert BrokerAccess.resolve() == BrokerAccess()
    assert BrokerAccess().headers() == {}
    file = tmp_path / "key"
    file.write_text("of-the-file\n")
    monkeypatch.setenv("CONSERVE_BROKER_API_KEY_FILE", str(file))
    assert BrokerAccess.resolve().headers() == {"Authorization": "Bearer of-the-file"}
    monkeypatch.setenv("CONSERVE_BROKER_API_KEY", " of-the-variable ")
    assert BrokerAccess.resolve().api_key == "of-the-variable"
    assert BrokerAccess.resolve(api_key="of-the-argument").api_key == "of-the-argument"
    assert BrokerAccess.resolve(api_key="").api_key == "", "an empty argument means none"


def test_a_key_file_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CONSERVE_BROKER_API_KEY_FILE", str(tmp_path / "missing"))
    with pytest.raises(AccessFaultError, match=r"CONSERVE_BROKER_API_KEY_FILE: cannot read .*missing"):
        BrokerAccess.resolve()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    monkeypatch.setenv("CONSERVE_BROKER_API_KEY_FILE", str(tmp_path / "binary"))
    with pytest.raises(ConfigError, match="it is no text"):
        ConServe("http://broker:7070")


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "é", "x" * 257])
def test_what_cannot_be_a_key_is_refused_without_showing_it(key):
    with pytest.raises(ConfigError) as caught:
        ConServe("http://broker:7070", broker_api_key=key)
    assert caught.value.key == "broker_api_key"
    assert key not in str(caught.value)


def test_certificate_and_key_go_together():
    with pytest.raises(ConfigError, match="broker_cert and broker_cert_key go together"):
        ConServe("https://broker:7070", broker_cert="cert.pem")


@pytest.mark.parametrize("option", [{"broker_ca": "missing.pem"}, {"broker_cert": "a.pem", "broker_cert_key": "b.pem"}])
def test_files_that_cannot_be_used_are_named_at_once(option):
    with pytest.raises(ConfigError, match=r"cannot use .*pem for TLS to the broker"):
        ConServe("https://broker:7070", **option)
    ConServe("http://broker:7070", **option).close()  # no TLS, nothing to read


def test_the_front_door_takes_the_key_and_passes_the_engines_own_on():
    client = conserve_sdk.openai_client("http://keyed:7070", broker_api_key=SECRET, api_key="the-engines-own")
    assert client.api_key == "the-engines-own"
    assert connect("http://keyed:7070", broker_api_key=SECRET) is connect("http://keyed:7070", broker_api_key=SECRET)
    assert connect("http://keyed:7070", broker_api_key="other") is not connect(
        "http://keyed:7070", broker_api_key=SECRET
    )
    asynchronous = conserve_sdk.async_openai_client("http://keyed:7070", broker_api_key=SECRET)
    assert asynchronous.api_key == "EMPTY", "the broker's key is no engine's"


# ---- where it must not go ---------------------------------------------------------------------------------------


def test_neither_repr_nor_pickle_nor_settings_hold_the_key(monkeypatch):
    access = BrokerAccess.resolve(api_key=SECRET, ca_file="ca.pem")
    conserve = ConServe("http://broker:7070", broker_api_key=SECRET)
    transport = conserve.transport()
    try:
        for thing in (access, conserve, transport, conserve._runtime.settings, conserve._runtime.broker):
            assert SECRET not in repr(thing)
        assert SECRET not in str(vars(conserve._runtime.broker))
        for thing in (access, conserve):
            assert SECRET.encode() not in pickle.dumps(thing)
        monkeypatch.setenv("CONSERVE_BROKER_API_KEY", "of-the-other-process")
        copied = pickle.loads(pickle.dumps(conserve))
        assert copied._runtime.settings.access.api_key == "of-the-other-process"
        copied.close()
        assert pickle.loads(pickle.dumps(access)).ca_file == "ca.pem"
        assert copy.deepcopy(conserve) is conserve
    finally:
        conserve.close()


def test_it_goes_to_the_broker_and_nowhere_else(colour):
    elsewhere = httpx2.Response(307, headers={"location": "http://elsewhere.invalid/v1/leases"})
    script = Script(elsewhere)
    client = colour.client(httpx2.MockTransport(script), access=BrokerAccess(api_key=SECRET))
    with pytest.raises(conserve_sdk.ProtocolError) as caught:
        colour.run(client.acquire(REQUEST, budget_ms=1_000))
    assert script.hosts == ["broker.invalid"], "redirects are not followed"
    assert script.requests[0].headers["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in f"{caught.value!r} {caught.value} {pickle.dumps(caught.value)!r}"


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"), [(401, "key_missing"), (401, "key_unknown"), (401, "key_expired"), (403, "scope_missing")]
)
def test_a_denial_is_said_once_and_says_what_to_do(colour, status, code, caplog):
    script = Script(problem(status, code))
    client = colour.client(httpx2.MockTransport(script), access=BrokerAccess(api_key=SECRET))
    with caplog.at_level(logging.DEBUG), pytest.raises(AccessDenied) as caught:
        colour.run(client.acquire(REQUEST, budget_ms=5_000))
    assert (caught.value.status, caught.value.code, len(script.requests)) == (status, code, 1)
    assert "CONSERVE_BROKER_API_KEY" in str(caught.value)
    assert SECRET not in caplog.text + repr(caught.value)


def test_retry_after_is_obeyed_within_the_budget(colour):
    slow = problem(429, "rate_limited", retry_after_ms=700)
    script = Script(slow, slow, granted(), clock=colour.clock, takes_ms=10)
    client = colour.client(httpx2.MockTransport(script), urls=("http://one.invalid", "http://two.invalid"))
    colour.run(client.acquire(REQUEST, budget_ms=5_000))
    assert colour.sleeps == [0.7, 0.7]
    assert script.hosts == ["one.invalid"] * 3, "another broker would not be slower to anger"


def test_the_header_alone_is_obeyed_too(colour):
    script = Script(problem(429, "rate_limited", headers={"retry-after": "2"}), granted())
    client = colour.client(httpx2.MockTransport(script))
    colour.run(client.acquire(REQUEST, budget_ms=5_000))
    assert colour.sleeps == [2.0]


def test_a_wait_beyond_the_budget_is_not_begun(colour):
    script = Script(problem(429, "rate_limited", retry_after_ms=10_000))
    client = colour.client(httpx2.MockTransport(script))
    with pytest.raises(RateLimited) as caught:
        colour.run(client.acquire(REQUEST, budget_ms=5_000))
    assert (caught.value.retry_after_ms, caught.value.status, colour.sleeps) == (10_000, 429, [])
    assert pickle.loads(pickle.dumps(caught.value)).retry_after_ms == 10_000


def test_a_denied_program_does_not_fall_back_to_engines_behind_the_brokers_back():
    script = Script(problem(401, "key_unknown"))
    options = {"broker_transport": httpx2.MockTransport(script), "on_turn": ()}
    with ConServe("http://broker:7070", fallback_engines=["http://engine:8000"], **options) as conserve:
        client = conserve.openai_client(max_retries=0)
        with pytest.raises(AccessDenied):
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello " * 500}])


@pytest.mark.parametrize("answer", [problem(401, "key_expired"), problem(429, "rate_limited", retry_after_ms=60_000)])
def test_reports_wait_for_a_better_key_or_time(answer):
    clock = FakeClock(start_ms=1_000_000)
    script = Script(answer, httpx2.Response(200, json={"results": [{"lease_id": "L1", "verdict": "ok"}]}))
    colour = Colour("sync")
    client = colour.client(httpx2.MockTransport(script))
    reporter = Reporter(client, LeaseRegistry(), clock=clock.now_ms, threaded=False, call_budget_ms=1)
    reporter.submit(TurnStartedReport(token="token-L1"))
    assert not reporter.flush(0.1)
    clock.advance(60_000)
    assert reporter.flush(0.1)
    assert (len(script.requests), reporter.dropped) == (2, 0)
    reporter.close()


def test_a_proxys_page_is_no_denial_of_ours(colour):
    script = Script(httpx2.Response(403, text="<html>"))
    client = colour.client(httpx2.MockTransport(script))
    with pytest.raises(conserve_sdk.ProtocolError) as caught:
        colour.run(client.acquire(REQUEST, budget_ms=1_000))
    assert not isinstance(caught.value, AccessDenied | BrokerUnavailable)


# ---- the engines' own keys --------------------------------------------------------------------------------------


class SharingBroker(httpx2.BaseTransport):
    """The in-memory broker, whose leases bring the keys of their engines along."""

    def __init__(self) -> None:
        self.inner = InMemoryBroker(settings=BrokerSettings(placement=PAPER))

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        answer = self.inner.handle_request(request)
        if request.url.path == "/v1/leases":
            body = json.loads(answer.content)
            for role in ("decoder", "prefiller"):
                body[role]["api_key"] = f"key-of-{body[role]['engine_id']}"
            return httpx2.Response(answer.status_code, json=body)
        return answer


def test_keys_that_come_with_a_lease_go_to_its_engines_and_nowhere_else(caplog):
    engine, turns = ScriptedEngine(then="answer"), conserve_sdk.TurnCollector()
    broker = SharingBroker()
    options = {"broker_transport": broker, "engine_transport": engine, "on_turn": [turns, conserve_sdk.LoggingHook()]}
    with caplog.at_level(logging.DEBUG), ConServe(broker.inner.url, **options) as conserve:
        client = conserve.openai_client(api_key="the-applications-own", max_retries=0)
        with conserve_sdk.conversation("c"):
            client.chat.completions.create(model="test-model", messages=[{"role": "user", "content": "hello " * 400}])
        client.models.list()
        grants = repr(conserve._runtime.kit.registry.live_grants(now_ms=conserve._runtime.kit.now_ms()))
    sent = {(call.engine, call.headers["authorization"]) for call in engine.calls}
    assert sent == {(name, f"Bearer key-of-{name}") for name in {call.engine for call in engine.calls}}
    assert len({call.engine for call in engine.calls}) == 2
    reported = [exchange.request for exchange in broker.inner.exchanges]
    for text in (caplog.text, repr(turns.records), grants, repr(reported)):
        assert "key-of-" not in text

"""One trace from the SDK's turn over the broker's grant to the engines, through a real OpenTelemetry SDK."""

import builtins
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig, ConfigProblem
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk import ConServe, OpenTelemetryHook, conversation
from tests.broker.broker_process import until

BUDGET_S = 40.0
SECRET = "the secret of the prompt"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Telemetry:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    telemetry.provider.shutdown()


@pytest.fixture(scope="module")
def fleet() -> Iterator[EmulatedFleet]:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=1, time_scale=0)) as running:
        yield running


@pytest.fixture
def url(fleet: EmulatedFleet, telemetry: Telemetry) -> Iterator[str]:
    tables: dict[str, Any] = {
        "listen": {"port": 0},
        "placement": {"preset": "paper"},
        "scrape": {"interval_ms": 100},
        "watch": {"tracing": "otel"},
        "engine": [{**engine, "kv_capacity_tokens": 20_000} for engine in fleet.broker_engines()],
    }
    with BrokerServer(BrokerConfig.from_mapping(tables), tracer_provider=telemetry.provider) as server:
        server.wait_until_ready(engines=2, timeout_s=BUDGET_S)
        yield server.url


def ask(url: str, conversation_id: str, *, tokens: int = 1_000, wait_ms: int = 0, **headers: str) -> httpx2.Response:
    body = {"conversation_id": conversation_id, "lineage": "main", "model": "emulated", "wait_ms": wait_ms}
    return httpx2.post(
        f"{url}/v1/leases", json={**body, "first_turn_input_tokens": tokens}, headers=headers, timeout=BUDGET_S
    )


def parent_id(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


def test_one_trace_from_the_turn_over_the_grant_to_the_engines(url: str, telemetry: Telemetry) -> None:
    hook = OpenTelemetryHook(tracer_provider=telemetry.provider)
    with ConServe(url, on_turn=hook) as conserve:
        client = conserve.openai_client()
        with conversation("traced"):
            client.chat.completions.create(model="emulated", messages=[{"role": "user", "content": SECRET * 50}])
        until(lambda: bool(telemetry.named("conserve reports")))
    (turn,) = telemetry.named("chat emulated")
    (grant,) = telemetry.named("conserve grant")
    (place,) = telemetry.named("conserve place")
    (prefill,) = telemetry.named("conserve prefill")
    (decode,) = telemetry.named("conserve decode")
    trace = turn.context.trace_id
    assert {span.context.trace_id for span in (grant, place, prefill, decode)} == {trace}
    assert parent_id(grant) == parent_id(prefill) == parent_id(decode) == turn.context.span_id
    assert parent_id(place) == grant.context.span_id
    assert grant.kind is SpanKind.SERVER
    assert turn.start_time <= grant.start_time <= grant.end_time <= prefill.start_time <= decode.start_time
    attributes = dict(grant.attributes or {})
    assert attributes["conserve.lease.id"] == turn.attributes["conserve.lease.id"]
    assert attributes["conserve.decoder"] == decode.attributes["conserve.engine"] == "d0"
    assert attributes["conserve.prefiller"] == prefill.attributes["conserve.engine"] == "p0"
    assert attributes["gen_ai.conversation.id"] == "traced"
    assert (attributes["conserve.mode"], attributes["conserve.rule"]) == ("migrate", "most_free_kv")
    assert attributes["http.response.status_code"] == 201
    assert telemetry.named("conserve reports")[0].attributes["conserve.reports"] >= 1
    assert SECRET not in repr([span.to_json() for span in telemetry.exporter.get_finished_spans()])


def test_the_applications_own_trace_reaches_the_broker(url: str, telemetry: Telemetry) -> None:
    with ConServe(url) as conserve:
        client = conserve.openai_client()
        with conversation("own"):
            client.chat.completions.create(
                model="emulated",
                messages=[{"role": "user", "content": "hello"}],
                extra_headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
            )
    (grant,) = telemetry.named("conserve grant")
    assert (grant.context.trace_id, parent_id(grant)) == (int(TRACE, 16), int(PARENT, 16))


def test_a_wait_is_a_span_of_its_own(url: str, telemetry: Telemetry) -> None:
    first = ask(url, "holder", tokens=15_000).json()
    waiting = threading.Thread(target=ask, args=(url, "patient"), kwargs={"tokens": 15_000, "wait_ms": 30_000})
    waiting.start()
    until(lambda: httpx2.get(f"{url}/v1/fleet").json()["waiting_requests"] == 1)
    holder = {"authorization": f"Lease {first['token']}"}
    httpx2.delete(f"{url}/v1/leases/{first['lease_id']}", headers=holder)
    waiting.join(BUDGET_S)
    (wait,) = telemetry.named("conserve wait")
    grant = next(span for span in telemetry.named("conserve grant") if span.context.span_id == parent_id(wait))
    assert grant.attributes["gen_ai.conversation.id"] == "patient"
    assert grant.attributes["conserve.lease.wait"] > 0


def test_a_refusal_is_an_error_of_its_span(url: str, telemetry: Telemetry) -> None:
    ask(url, "holder", tokens=15_000)
    assert ask(url, "refused", tokens=15_000, traceparent=f"00-{TRACE}-{PARENT}-01").status_code == 503
    refused = telemetry.named("conserve grant")[1]
    assert refused.attributes["error.type"] == "no_capacity"
    assert refused.status.status_code is StatusCode.ERROR
    assert refused.context.trace_id == int(TRACE, 16)
    assert httpx2.post(f"{url}/v1/leases", content=b"no json").status_code == 400
    assert telemetry.named("conserve grant")[2].attributes["error.type"] == "bad_request"
    assert telemetry.named("conserve grant")[2].status.status_code is StatusCode.UNSET


def test_renewals_are_too_many_to_be_traced(url: str, telemetry: Telemetry) -> None:
    token = ask(url, "c").json()["token"]
    httpx2.post(f"{url}/v1/renewals", json={"tokens": [token]})
    assert {span.name for span in telemetry.exporter.get_finished_spans()} == {"conserve grant", "conserve place"}


def test_without_opentelemetry_the_configuration_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigProblem, match=r"watch.tracing.*conserve-sdk\[otel\]"):
        BrokerServer(BrokerConfig.from_mapping({"watch": {"tracing": "otel"}}))

"""Spans and metrics through a real OpenTelemetry SDK with in-memory exporters, and the trace that engines get."""

import builtins
import pickle

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from conserve_sdk import ConfigError, OpenTelemetryHook
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.telemetry import HopEnd
from conserve_sdk.telemetry._opentelemetry import operation_of
from conserve_sdk.testing import EngineReply, FakeClock, InMemoryBroker, ScriptedEngine, ToolCall

MS = 1_000_000
SECRET = "the secret of the prompt"


class Telemetry:
    """A hook over a real SDK."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        self.hook = OpenTelemetryHook(tracer_provider=self.tracers, meter_provider=self.meters)

    @property
    def spans(self) -> dict:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def metrics(self) -> dict:
        data = self.reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def close(self) -> None:
        self.meters.shutdown()
        self.tracers.shutdown()


@pytest.fixture
def telemetry():
    telemetry = Telemetry()
    yield telemetry
    telemetry.close()


def started(make_world, telemetry, *replies, then="answer", **options):
    clock = FakeClock()
    broker = InMemoryBroker(settings=BrokerSettings(placement=PAPER), clock=clock)
    engine = ScriptedEngine(*replies, then=then, clock=clock)
    return make_world(broker=broker, engine=engine, on_turn=telemetry.hook, **options)


def test_one_trace_over_both_hops(make_world, telemetry) -> None:
    world = started(make_world, telemetry)
    tracer = telemetry.tracers.get_tracer("app")
    with tracer.start_as_current_span("agent"):
        assert world.turn(SECRET * 60).text == "ok"
    spans = telemetry.spans
    assert set(spans) == {"agent", "chat test-model", "conserve prefill", "conserve decode"}
    turn = spans["chat test-model"]
    assert turn.parent.span_id == spans["agent"].context.span_id
    assert turn.kind is SpanKind.CLIENT
    for phase, call in zip(("prefill", "decode"), world.engine.calls, strict=True):
        hop = spans[f"conserve {phase}"]
        assert hop.parent.span_id == turn.context.span_id
        assert hop.attributes["conserve.phase"] == phase
        assert hop.attributes["conserve.engine"] == call.engine
        assert hop.attributes["conserve.request.id"] == call.headers["x-request-id"]
        assert hop.attributes["server.address"] == f"{call.engine}.invalid"
        assert hop.attributes["http.response.status_code"] == 200
        context = hop.context
        assert call.headers["traceparent"] == "-".join(
            ("00", f"{context.trace_id:032x}", f"{context.span_id:016x}", f"{context.trace_flags:02x}")
        )
        assert "tracestate" not in call.headers
    assert {span.context.trace_id for span in spans.values()} == {spans["agent"].context.trace_id}


def test_attributes_of_a_turn(make_world, telemetry) -> None:
    world = started(make_world, telemetry)
    world.turn(SECRET * 60)
    shown = dict(telemetry.spans["chat test-model"].attributes)
    assert SECRET not in repr([span.to_json() for span in telemetry.spans.values()])
    lease = world.broker.journal()[0]
    decoder = world.engines_called[-1]
    assert shown.pop("conserve.lineage")
    assert shown == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "test-model",
        "gen_ai.request.stream": False,
        "gen_ai.conversation.id": "c1",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.model": "test-model",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "server.address": f"{decoder}.invalid",
        "server.port": 80,
        "conserve.lease.id": lease.lease_id,
        "conserve.lease.epoch": lease.epoch,
        "conserve.lease.wait": 0.0,
        "conserve.turn": 1,
        "conserve.first_turn": True,
        "conserve.mode": "migrate",
        "conserve.migrated": True,
        "conserve.decoder": decoder,
        "conserve.prefiller": "p0",
        "conserve.hops": 2,
        "conserve.failovers": 0,
        "conserve.ttft": 0.0,
        "conserve.ttfet": 0.0,
    }


def test_spans_begin_and_end_when_things_did(make_world, telemetry) -> None:
    prefill, decode = EngineReply.prefill().taking(300), EngineReply.chat_stream("a", "b").taking(50, between_ms=10)
    world = started(make_world, telemetry, prefill, decode, then="fail")
    world.turn(stream=True)
    turn, first, second = (telemetry.spans[name] for name in ("chat test-model", "conserve prefill", "conserve decode"))

    def span_ms(span) -> float:
        return (span.end_time - span.start_time) / MS

    gaps = len(decode.chunks) - 1
    assert (span_ms(first), span_ms(second), span_ms(turn)) == (300, 50 + gaps * 10, 350 + gaps * 10)
    assert first.start_time == turn.start_time
    assert second.start_time == first.end_time
    assert second.end_time == turn.end_time
    assert turn.attributes["gen_ai.response.time_to_first_chunk"] == 0.36  # the role's chunk carries no token
    assert turn.attributes["gen_ai.request.stream"] is True


def test_a_sent_trace_is_the_parent_where_no_span_is_current(make_world, telemetry) -> None:
    world = started(make_world, telemetry)
    world.turn(extra_headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=1"})
    turn = telemetry.spans["chat test-model"]
    assert (turn.context.trace_id, turn.parent.span_id) == (int("a" * 32, 16), int("b" * 16, 16))
    for call in world.engine.calls:
        assert call.headers["traceparent"].split("-")[1] == "a" * 32
        assert call.headers["traceparent"].split("-")[2] != "b" * 16
        assert call.headers.get_list("tracestate") == ["vendor=1"]


def test_a_current_span_wins_over_a_sent_trace(make_world, telemetry) -> None:
    world = started(make_world, telemetry)
    with telemetry.tracers.get_tracer("app").start_as_current_span("agent"):
        world.turn(extra_headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=1"})
    assert telemetry.spans["chat test-model"].parent.span_id == telemetry.spans["agent"].context.span_id
    assert all("tracestate" not in call.headers for call in world.engine.calls)


def test_without_an_sdk_the_applications_own_trace_passes(make_world) -> None:
    hook = OpenTelemetryHook(tracer_provider=trace.NoOpTracerProvider())
    world = make_world(on_turn=hook)
    world.turn(extra_headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=1"})
    for call in world.engine.calls:
        assert call.headers["traceparent"] == f"00-{'a' * 32}-{'b' * 16}-01"
        assert call.headers["tracestate"] == "vendor=1"


def test_a_failover_is_a_third_hop(make_world, telemetry) -> None:
    world = started(make_world, telemetry, EngineReply.prefill(), EngineReply.unreachable())
    world.turn()
    hops = [span for span in telemetry.exporter.get_finished_spans() if span.name.startswith("conserve ")]
    assert len(hops) == len(world.engine.calls) > 2
    assert [hop.attributes["conserve.engine"] for hop in hops] == world.engines_called
    failed = hops[1]
    assert (failed.status.status_code, failed.attributes["error.type"]) == (StatusCode.ERROR, "unreachable")
    turn = telemetry.spans["chat test-model"]
    assert (turn.attributes["conserve.failovers"], turn.attributes["conserve.loss"]) == (1, "decoder_failed")
    assert turn.status.status_code is StatusCode.UNSET


def test_a_failed_turn_is_an_error(make_world, telemetry) -> None:
    world = started(make_world, telemetry, EngineReply.prefill(), EngineReply.failure(404), EngineReply.failure(404))
    assert world.turn().error is not None
    turn = telemetry.spans["chat test-model"]
    assert (turn.status.status_code, turn.attributes["error.type"]) == (StatusCode.ERROR, "http_404")
    assert "gen_ai.usage.input_tokens" not in turn.attributes


def test_metrics(make_world, telemetry) -> None:
    tools = EngineReply.chat(tool_calls=[ToolCall("look", {"at": 1})])
    stream = EngineReply.chat_stream("a", "b", "c", cached_tokens=64).taking(20, between_ms=10)
    world = started(make_world, telemetry, EngineReply.prefill(), tools, stream, EngineReply.failure(400))
    question = {"role": "user", "content": "x" * 4000}
    world.turn(messages=[question])
    more = [{"role": "assistant", "content": "looked"}, {"role": "user", "content": "and?"}]
    world.turn(messages=[question, *more], stream=True)
    world.turn(messages=[question, *more, *more])
    seen = telemetry.metrics()

    def points(name):
        return list(seen[name].data.data_points)

    durations = points("gen_ai.client.operation.duration")
    assert sum(point.count for point in durations) == 3
    assert {point.attributes.get("error.type") for point in durations} == {None, "http_400"}
    assert all(point.attributes["gen_ai.operation.name"] == "chat" for point in durations)
    kinds = {point.attributes["gen_ai.token.type"]: point for point in points("gen_ai.client.token.usage")}
    assert {kind: (point.count, point.sum) for kind, point in kinds.items()} == {"input": (2, 200), "output": (2, 8)}
    (first_chunk,) = points("gen_ai.client.operation.time_to_first_chunk")
    assert (first_chunk.count, first_chunk.sum) == (1, 0.03)
    (tbt,) = points("conserve.tbt")
    assert (tbt.count, tbt.sum) == (2, 0.02)
    assert sum(point.count for point in points("conserve.ttfet")) == 1  # the turn that called a tool answers nobody
    assert [point.value for point in points("conserve.migrations")] == [1]
    assert sum(point.value for point in points("conserve.cached_tokens")) == 64
    assert sum(point.value for point in points("conserve.hops")) == len(world.engine.calls)
    assert {seen[name].unit for name in ("conserve.ttfet", "conserve.tbt", "conserve.lease.wait")} == {"s"}
    assert "conserve.losses" not in seen


def test_losses_are_counted_by_name(make_world, telemetry) -> None:
    world = started(make_world, telemetry, EngineReply.prefill(params=None))
    world.turn()
    (point,) = telemetry.metrics()["conserve.losses"].data.data_points
    assert (point.value, point.attributes["conserve.loss"]) == (1, "no_transfer_params")


@pytest.mark.parametrize(
    ("path", "operation"),
    [("/v1/chat/completions", "chat"), ("/v1/responses", "chat"), ("/v1/completions", "text_completion")],
)
def test_operations(path, operation) -> None:
    assert operation_of(path) == operation


def test_a_hop_ends_once(telemetry) -> None:
    from conserve_sdk.telemetry import TurnStart

    start = TurnStart(conversation_id="c", lineage="l", model="m", path="/v1/responses", turn=1, streams=False, at_us=0)
    telemetry.hook.begin_turn(start).end_hop(HopEnd(status=200, error="", at_us=1))
    assert telemetry.spans == {}


def test_pickle(telemetry) -> None:
    assert isinstance(pickle.loads(pickle.dumps(OpenTelemetryHook())), OpenTelemetryHook)
    with pytest.raises(TypeError, match="global"):
        pickle.dumps(telemetry.hook)


def test_without_the_library_it_names_the_extra(monkeypatch) -> None:
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"conserve-sdk\[otel\]"):
        OpenTelemetryHook()

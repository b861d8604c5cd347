"""docs/observability.md lists every name that the hooks use."""

import re
from pathlib import Path

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from conserve_sdk import OpenTelemetryHook, PrometheusHook
from conserve_sdk.testing import EngineReply, ScriptedEngine

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "observability.md").read_text()
LISTED = set(re.findall(r"`([a-z_.]+)`", DOCUMENT))


def test_every_span_attribute_and_metric_is_listed(make_world) -> None:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    # A transfer that fails, a decoder that has to be replaced, a stream: all that leaves an attribute.
    replies = [EngineReply.prefill(), EngineReply.unreachable(), EngineReply.prefill(params=None)]
    engine = ScriptedEngine(*replies, EngineReply.chat_stream("a", "b"), then="answer")
    world = make_world(engine=engine, on_turn=OpenTelemetryHook(tracer_provider=tracers, meter_provider=meters))
    world.turn(stream=True)
    world.turn(conversation_id="c2")
    spans = exporter.get_finished_spans()
    attributes = {name for span in spans for name in span.attributes}
    scopes = [scope for resource in reader.get_metrics_data().resource_metrics for scope in resource.scope_metrics]
    metrics = [metric for scope in scopes for metric in scope.metrics]
    points = [point for metric in metrics for point in metric.data.data_points]
    attributes |= {name for point in points for name in point.attributes}
    meters.shutdown()
    tracers.shutdown()
    assert {"conserve.loss", "conserve.phase", "error.type", "gen_ai.response.time_to_first_chunk"} <= attributes
    assert attributes | {metric.name for metric in metrics} <= LISTED


def test_every_prometheus_metric_is_listed() -> None:
    registry = CollectorRegistry()
    PrometheusHook(registry)
    names = {f"{family.name}_total" if family.type == "counter" else family.name for family in registry.collect()}
    assert len(names) == 14
    assert names <= LISTED
    assert {name for name in LISTED if name.startswith("conserve_sdk_")} <= names | {"conserve_sdk_"}

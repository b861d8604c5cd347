"""The metrics of `OpenTelemetryHook`: OpenTelemetry's three for clients of models, and ConServe's own."""

from __future__ import annotations

from typing import Any

from opentelemetry.context import Context
from opentelemetry.metrics import Histogram, Meter

from conserve_sdk.telemetry._record import TurnRecord, observed_gaps

__all__ = ["TurnMetrics"]

DURATION_BUCKETS_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TBT_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)

Attributes = dict[str, Any]


class TurnMetrics:
    """Counts turns on one meter."""

    def __init__(self, meter: Meter) -> None:
        def seconds(name: str, text: str, buckets: tuple[float, ...] = DURATION_BUCKETS_S) -> Histogram:
            return meter.create_histogram(
                name, unit="s", description=text, explicit_bucket_boundaries_advisory=list(buckets)
            )

        self._duration = seconds("gen_ai.client.operation.duration", "Duration of a turn, lease wait included")
        self._first_chunk = seconds("gen_ai.client.operation.time_to_first_chunk", "Time to the first streamed token")
        self._usage = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Input and output tokens of a turn",
            explicit_bucket_boundaries_advisory=list(map(float, TOKEN_BUCKETS)),
        )
        self._ttfet = seconds("conserve.ttfet", "Arrival of a tool loop to the first token of its answer")
        self._tbt = seconds("conserve.tbt", "Time between tokens", TBT_BUCKETS_S)
        self._lease_wait = seconds("conserve.lease.wait", "Time spent waiting for the broker")
        self._migrations = meter.create_counter("conserve.migrations", unit="{migration}", description="KV transfers")
        self._losses = meter.create_counter("conserve.losses", unit="{turn}", description="Turns that lost something")
        self._failovers = meter.create_counter("conserve.failovers", unit="{failover}", description="Decoders replaced")
        self._hops = meter.create_counter("conserve.hops", unit="{request}", description="Requests to engines")
        self._cached = meter.create_counter(
            "conserve.cached_tokens", unit="{token}", description="Prompt tokens that an engine's cache had"
        )

    def count(self, record: TurnRecord, shared: Attributes, *, context: Context) -> None:
        """Count one turn; the context carries its span, for exemplars."""
        common = shared | {"gen_ai.request.model": record.model}
        if record.response_model:
            common["gen_ai.response.model"] = record.response_model
        outcome = common | ({"error.type": record.error} if record.error else {})
        self._duration.record(record.duration_ms / 1000, outcome, context=context)
        if record.streamed and record.ttft_ms is not None:
            self._first_chunk.record(record.ttft_ms / 1000, common, context=context)
        if record.prompt_tokens:
            self._usage.record(record.prompt_tokens, common | {"gen_ai.token.type": "input"}, context=context)
            self._usage.record(record.completion_tokens, common | {"gen_ai.token.type": "output"}, context=context)
        self._count_own(record, common, context)

    def _count_own(self, record: TurnRecord, common: Attributes, context: Context) -> None:
        own = common | ({"conserve.mode": record.mode} if record.mode else {})
        if record.ttfet_ms is not None:
            self._ttfet.record(record.ttfet_ms / 1000, own, context=context)
        for gap_us in observed_gaps(record):
            self._tbt.record(gap_us / 1_000_000, own, context=context)
        self._lease_wait.record(record.lease_wait_ms / 1000, own, context=context)
        for counter, amount in (
            (self._migrations, int(record.migrated)),
            (self._failovers, record.failovers),
            (self._hops, record.hops),
            (self._cached, record.cached_tokens),
        ):
            if amount:
                counter.add(amount, own, context=context)
        if record.loss:
            self._losses.add(1, own | {"conserve.loss": record.loss}, context=context)

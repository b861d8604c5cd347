"""The metrics page, under vLLM's own names (vllm/v1/metrics/loggers.py and the NIXL connector's stats.py)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from conserve_lab.engine_model import EngineModel

_LATENCY_S: Final = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
_TTFT_S: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_ITL_S: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_TRANSFER_S: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
_BYTES: Final = tuple(float(2 ** (10 + power)) for power in range(1, 25, 2))
_DESCRIPTORS: Final = (
    10.0,
    20.0,
    30.0,
    50.0,
    75.0,
    100.0,
    200.0,
    400.0,
    1000.0,
    2000.0,
    4000.0,
    10000.0,
    20000.0,
    50000.0,
)
FINISHED_REASONS: Final = ("stop", "length", "abort", "error")


class Histogram:
    """Counts per bucket; the upper bounds are inclusive, as in Prometheus."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.count = 0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value
        self.count += 1

    def buckets(self) -> list[tuple[str, float]]:
        """Return cumulative counts by upper bound."""
        total = 0
        rows: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            rows.append(("+Inf" if bound == float("inf") else str(bound), total))
        return rows


@dataclass(slots=True)
class EngineMetrics:
    """What the emulator counts beside the model's own counters."""

    finished: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    failed_transfers: int = 0
    notifications_after_expiry: int = 0
    ttft_s: Histogram = field(default_factory=lambda: Histogram(_TTFT_S))
    itl_s: Histogram = field(default_factory=lambda: Histogram(_ITL_S))
    e2e_s: Histogram = field(default_factory=lambda: Histogram(_LATENCY_S))
    transfer_s: Histogram = field(default_factory=lambda: Histogram(_TRANSFER_S))
    post_s: Histogram = field(default_factory=lambda: Histogram((0.001, *_TRANSFER_S)))
    transfer_bytes: Histogram = field(default_factory=lambda: Histogram(_BYTES))
    transfer_descriptors: Histogram = field(default_factory=lambda: Histogram(_DESCRIPTORS))


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSource:
    """What a page is made of."""

    model: EngineModel
    metrics: EngineMetrics
    model_name: str
    role: str
    started_at_s: float
    """Unix time; a restart shows here as `process_start_time_seconds`."""


def metrics_page(source: MetricsSource) -> bytes:
    """Return the page in the Prometheus text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(source))
    return generate_latest(registry)


class _Page(Collector):
    def __init__(self, source: MetricsSource) -> None:
        self._source = source
        self._names = ["engine", "model_name"]
        self._values = ["0", source.model_name]

    def collect(self) -> Iterator[Metric]:
        yield self._cache_config()
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()
        start = GaugeMetricFamily("process_start_time_seconds", "Start time of the process since unix epoch.")
        start.add_metric([], self._source.started_at_s)
        yield start
        refusals = CounterMetricFamily(
            "conserve_emulator_refusals",
            "Requests that would crash a real vLLM or make it answer wrongly.",
            labels=["reason"],
        )
        for reason, count in sorted(self._source.metrics.refusals.items()):
            refusals.add_metric([reason], count)
        yield refusals
        role = GaugeMetricFamily("conserve_emulator_info", "The engine's configured role.", labels=["role"])
        role.add_metric([self._source.role], 1)
        yield role

    def _cache_config(self) -> Metric:
        config = self._source.model.config
        labels = {
            "block_size": str(config.block_size),
            "enable_prefix_caching": "True",
            "engine": "0",
            "kv_cache_size_tokens": str(config.kv_capacity_tokens),
            "num_gpu_blocks": str(config.kv_blocks),
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Information of the LLMEngine CacheConfig", labels=list(labels)
        )
        family.add_metric(list(labels.values()), 1)
        return family

    def _gauges(self) -> Iterator[Metric]:
        model = self._source.model
        yield self._gauge("num_requests_running", "Number of requests in model execution batches.", model.running)
        yield self._gauge("num_requests_waiting", "Number of requests waiting to be processed.", model.waiting)
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", model.kv_usage_ppm / 1e6)
        reasons = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason", "Waiting requests by reason.", labels=[*self._names, "reason"]
        )
        reasons.add_metric([*self._values, "capacity"], model.waiting - model.fetching)
        reasons.add_metric([*self._values, "deferred"], model.fetching)
        yield reasons

    def _counters(self) -> Iterator[Metric]:
        counters, metrics = self._source.model.counters, self._source.metrics
        yield self._counter("prefix_cache_queries", "Prefix cache queries in tokens.", counters.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prefix cache hits in tokens.", counters.prefix_hits)
        yield self._counter("external_prefix_cache_queries", "Queries to the KV connector.", counters.external_queries)
        yield self._counter("external_prefix_cache_hits", "Hits of the KV connector.", counters.external_hits)
        yield self._counter("num_preemptions", "Cumulative number of preemptions.", counters.preemptions)
        yield self._counter("prompt_tokens", "Number of prefill tokens processed.", counters.prompt_tokens)
        yield self._counter(
            "prompt_tokens_cached", "Cached prompt tokens.", counters.local_cache_hit_tokens + counters.external_tokens
        )
        yield self._counter("generation_tokens", "Generation tokens processed.", counters.generation_tokens)
        sources = {
            "local_compute": counters.local_compute_tokens,
            "local_cache_hit": counters.local_cache_hit_tokens,
            "external_kv_transfer": counters.external_tokens,
        }
        yield self._labelled("prompt_tokens_by_source", "Prompt tokens by source.", "source", sources)
        finished = {reason: metrics.finished[reason] for reason in FINISHED_REASONS}
        yield self._labelled("request_success", "Finished requests.", "finished_reason", finished)
        yield self._counter("nixl_num_failed_transfers", "Failed NIXL transfers.", metrics.failed_transfers)
        yield self._counter("nixl_num_failed_notifications", "Failed NIXL notifications.", 0)
        yield self._counter("nixl_num_kv_expired_reqs", "Requests whose KV expired.", counters.holds_expired)
        yield self._counter(
            "nixl_num_notifications_after_expiry",
            "Notifications for requests no longer tracked.",
            metrics.notifications_after_expiry,
        )

    def _histograms(self) -> Iterator[Metric]:
        metrics = self._source.metrics
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Time to first token.", metrics.ttft_s),
            ("inter_token_latency_seconds", "Time between tokens.", metrics.itl_s),
            ("e2e_request_latency_seconds", "Whole requests.", metrics.e2e_s),
            ("nixl_xfer_time_seconds", "Duration of NIXL transfers.", metrics.transfer_s),
            ("nixl_post_time_seconds", "Post time of NIXL transfers.", metrics.post_s),
            ("nixl_bytes_transferred", "Bytes per NIXL transfer.", metrics.transfer_bytes),
            ("nixl_num_descriptors", "Descriptors per NIXL transfer.", metrics.transfer_descriptors),
        ):
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=self._names)
            family.add_metric(self._values, histogram.buckets(), histogram.sum)
            yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def _labelled(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=[*self._names, label])
        for key, value in values.items():
            family.add_metric([*self._values, key], value)
        return family

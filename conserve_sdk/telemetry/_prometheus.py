"""Turns as Prometheus metrics. Needs the extra `prometheus`."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from conserve_sdk.errors import ConfigError
from conserve_sdk.telemetry._record import TurnRecord, observed_gaps

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["PrometheusHook"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TBT_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class PrometheusHook:
    """Counters and histograms of this process's turns; docs/observability.md lists them.

    Hooks of one registry share its metrics, so that several `ConServe` objects add up. Nothing is served: expose the
    registry as the rest of your program does.

    Args:
        registry: where the metrics are registered; `prometheus_client`'s global one by default.

    Raises:
        ConfigError: `prometheus-client` is not installed.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        try:
            import prometheus_client
        except ModuleNotFoundError as missing:
            raise ConfigError(
                "PrometheusHook needs prometheus-client: pip install 'conserve-sdk[prometheus]'", key="on_turn"
            ) from missing
        self._given = registry is not None
        self._families = _families_of(prometheus_client.REGISTRY if registry is None else registry)

    def __call__(self, record: TurnRecord, /) -> None:
        """Count a turn that ended."""
        self._families.count(record)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a hook of the other process's global registry.

        Raises:
            TypeError: it was made with a registry of its own.
        """
        if self._given:
            raise TypeError("a PrometheusHook with a registry of its own cannot be pickled: use the global one")
        return (PrometheusHook, ())


class _Families:
    """The metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Histogram

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"conserve_sdk_{name}", text, ("model", *labels), registry=registry)

        def seconds(name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(
                f"conserve_sdk_{name}_seconds", text, ("model", *labels), registry=registry, buckets=buckets
            )

        self._turns = counter("turns", "Turns that ended", "mode", "outcome")
        self._losses = counter("losses", "Turns that lost something", "loss")
        self._migrations = counter("migrations", "KV transfers from a prefiller to a decoder")
        self._failovers = counter("failovers", "Decoders replaced before the first byte")
        self._hops = counter("engine_requests", "HTTP requests to engines, failed ones included")
        self._prompt = counter("prompt_tokens", "Prompt tokens, cached ones included")
        self._cached = counter("cached_prompt_tokens", "Prompt tokens that the decoder's cache had")
        self._completion = counter("completion_tokens", "Generated tokens")
        self._duration = seconds("turn_duration", "Arrival of a turn to its last byte", "mode")
        self._ttft = seconds("ttft", "Arrival of a turn to its first token", "mode")
        self._ttfet = seconds("ttfet", "Arrival of a tool loop to the first token of its answer")
        self._tbt = seconds("tbt", "Time between tokens", buckets=TBT_SECONDS)
        self._lease_wait = seconds("lease_wait", "Time that first turns spent waiting for the broker")
        self._prefill = seconds("prefill", "Duration of prefill requests")

    def count(self, record: TurnRecord) -> None:
        model, mode = record.model, record.mode or "none"
        self._turns.labels(model, mode, record.error or "ok").inc()
        for family, amount in (
            (self._migrations, int(record.migrated)),
            (self._failovers, record.failovers),
            (self._hops, record.hops),
            (self._prompt, record.prompt_tokens),
            (self._cached, record.cached_tokens),
            (self._completion, record.completion_tokens),
        ):
            family.labels(model).inc(amount)
        if record.loss:
            self._losses.labels(model, record.loss).inc()
        self._time(record, model, mode)

    def _time(self, record: TurnRecord, model: str, mode: str) -> None:
        self._duration.labels(model, mode).observe(record.duration_ms / 1000)
        if record.ttft_ms is not None:
            self._ttft.labels(model, mode).observe(record.ttft_ms / 1000)
        if record.first_turn:
            self._lease_wait.labels(model).observe(record.lease_wait_ms / 1000)
        for family, span_ms in ((self._ttfet, record.ttfet_ms), (self._prefill, record.prefill_ms)):
            if span_ms is not None:
                family.labels(model).observe(span_ms / 1000)
        tbt = self._tbt.labels(model)
        for gap_us in observed_gaps(record):
            tbt.observe(gap_us / 1_000_000)


_by_registry: weakref.WeakKeyDictionary[CollectorRegistry, _Families] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _families_of(registry: CollectorRegistry) -> _Families:
    with _lock:
        families = _by_registry.get(registry)
        if families is None:
            families = _by_registry[registry] = _Families(registry)
        return families

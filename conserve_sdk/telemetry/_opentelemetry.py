"""Traces and metrics by OpenTelemetry's conventions for generative AI. Needs the extra `otel`.

Names are written out: the constants of `opentelemetry-semantic-conventions` for them are marked as moved and leave
with its next versions. As of semantic conventions 1.38 for `gen_ai.*`; `conserve.*` is this project's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import httpx2

from conserve_sdk.errors import ConfigError
from conserve_sdk.telemetry._observer import HopEnd, HopStart, TurnStart, TurnWatch
from conserve_sdk.telemetry._record import TurnRecord

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, Tracer, TracerProvider

    from conserve_sdk.telemetry._opentelemetry_metrics import TurnMetrics

__all__ = ["OpenTelemetryHook"]

SCOPE = "conserve_sdk"
PROVIDER = "vllm"
TRACE_STATE = "tracestate"


class OpenTelemetryHook:
    """A span per turn with a child span per request to an engine, and metrics.

    The turn's span `chat {model}` is a child of the span that is current where the application makes its call, else
    of the `traceparent` that the application sends itself. The spans of the prefill and of the decode request are
    its children, and their context goes to the engines in `traceparent` and `tracestate`, so that vLLM's own spans
    of both hops join the same trace (start it with `--otlp-traces-endpoint`). docs/observability.md lists all names.

    Args:
        tracer_provider, meter_provider: OpenTelemetry's global ones by default.

    Raises:
        ConfigError: `opentelemetry-api` is not installed.
    """

    def __init__(
        self, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        try:
            from opentelemetry import metrics, trace

            from conserve_sdk.telemetry._opentelemetry_metrics import TurnMetrics
        except ModuleNotFoundError as missing:
            raise ConfigError(
                "OpenTelemetryHook needs opentelemetry-api: pip install 'conserve-sdk[otel]'", key="on_turn"
            ) from missing
        self._given = tracer_provider is not None or meter_provider is not None
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        self._metrics = TurnMetrics(metrics.get_meter(SCOPE, meter_provider=meter_provider))

    def begin_turn(self, turn: TurnStart, /) -> TurnWatch:
        """Start the turn's span."""
        return _TurnSpan(self._tracer, self._metrics, turn)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a hook of the other process's global providers.

        Raises:
            TypeError: it was made with providers of its own.
        """
        if self._given:
            raise TypeError("an OpenTelemetryHook with providers of its own cannot be pickled: set the global ones")
        return (OpenTelemetryHook, ())


class _TurnSpan:
    """The spans of one turn. Their times follow the turn's own clock, anchored once at the wall clock."""

    def __init__(self, tracer: Tracer, metrics: TurnMetrics, turn: TurnStart) -> None:
        from opentelemetry.trace import SpanKind

        self._tracer = tracer
        self._metrics = metrics
        self._operation = operation_of(turn.path)
        self._epoch_ns = _clock(turn.at_us)
        self._server: dict[str, Any] = {}
        self._hop: Span | None = None
        self._span = tracer.start_span(
            f"{self._operation} {turn.model}",
            context=_parent(turn),
            kind=SpanKind.CLIENT,
            attributes=_start_attributes(turn, self._operation),
            start_time=self._epoch_ns(turn.at_us),
        )

    def begin_hop(self, hop: HopStart, headers: MutableMapping[str, str], /) -> None:
        """Start the hop's span, and let the engine join the trace."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._server = _server(hop.url)
        attributes = {
            "conserve.phase": hop.phase,
            "conserve.engine": hop.engine_id,
            "conserve.request.id": hop.request_id,
            "http.request.method": "POST",
            **self._server,
        }
        self._hop = self._tracer.start_span(
            f"conserve {hop.phase}",
            context=_context(self._span),
            kind=SpanKind.CLIENT,
            attributes=attributes,
            start_time=self._epoch_ns(hop.at_us),
        )
        if self._hop.get_span_context().is_valid:
            headers.pop(TRACE_STATE, None)  # the application's own belongs to its own traceparent
            TraceContextTextMapPropagator().inject(headers, context=_context(self._hop))

    def carry(self, headers: MutableMapping[str, str], /) -> None:
        """Let the broker join the trace."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if self._span.get_span_context().is_valid:
            TraceContextTextMapPropagator().inject(headers, context=_context(self._span))

    def end_hop(self, hop: HopEnd, /) -> None:
        """End the hop's span."""
        span, self._hop = self._hop, None
        if span is None:
            return
        if hop.status is not None:
            span.set_attribute("http.response.status_code", hop.status)
        _fail(span, hop.error)
        span.end(end_time=self._epoch_ns(hop.at_us))

    def end(self, record: TurnRecord, /, *, at_us: int) -> None:
        """End the turn's span and count the turn."""
        self._span.set_attributes({**_end_attributes(record), **self._server})
        _fail(self._span, record.error)
        self._span.end(end_time=self._epoch_ns(at_us))
        shared = {"gen_ai.operation.name": self._operation, "gen_ai.provider.name": PROVIDER, **self._server}
        self._metrics.count(record, shared, context=_context(self._span))


def operation_of(path: str) -> str:
    """The convention's word for a route: chat and responses are `chat`, the old completions `text_completion`."""
    return "text_completion" if path.endswith("/completions") and not path.endswith("/chat/completions") else "chat"


def _clock(at_us: int) -> Callable[[int], int]:
    """Turn instants of the turn's clock into nanoseconds since the epoch."""
    anchor_ns = time.time_ns()
    return lambda later_us: anchor_ns + (later_us - at_us) * 1000


def _context(span: Span) -> Context:
    from opentelemetry.trace import set_span_in_context

    return set_span_in_context(span)


def _parent(turn: TurnStart) -> Context:
    """The context around the application's call; where no span is current, with the trace that it sent itself."""
    from opentelemetry.context import get_current
    from opentelemetry.trace import get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    current = get_current()
    if get_current_span(current).get_span_context().is_valid:
        return current
    return TraceContextTextMapPropagator().extract(turn.trace, context=current)


def _server(url: str) -> dict[str, Any]:
    where = httpx2.URL(url)
    return {"server.address": where.host, "server.port": where.port or (443 if where.scheme == "https" else 80)}


def _start_attributes(turn: TurnStart, operation: str) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": turn.model,
        "gen_ai.request.stream": turn.streams,
        "gen_ai.conversation.id": turn.conversation_id,
        "conserve.lineage": turn.lineage,
        "conserve.turn": turn.turn,
    }


def _end_attributes(record: TurnRecord) -> dict[str, Any]:
    streamed_ms = record.ttft_ms if record.streamed else None
    shown = {
        "gen_ai.response.id": record.response_id,
        "gen_ai.response.model": record.response_model,
        "gen_ai.response.finish_reasons": (record.finish_reason,) if record.finish_reason else (),
        "gen_ai.response.time_to_first_chunk": None if streamed_ms is None else streamed_ms / 1000,
        "conserve.lease.id": record.lease_id,
        "conserve.mode": record.mode,
        "conserve.decoder": record.decoder_id,
        "conserve.prefiller": record.prefill_engine_id,
        "conserve.loss": record.loss,
        "conserve.ttft": None if record.ttft_ms is None else record.ttft_ms / 1000,
        "conserve.ttfet": None if record.ttfet_ms is None else record.ttfet_ms / 1000,
    }
    always = {
        "conserve.first_turn": record.first_turn,
        "conserve.migrated": record.migrated,
        "conserve.hops": record.hops,
        "conserve.failovers": record.failovers,
        "conserve.lease.wait": record.lease_wait_ms / 1000,
    }
    if record.lease_id is not None:
        always["conserve.lease.epoch"] = record.epoch
    usage = {
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
    }
    given = {name: value for name, value in shown.items() if value not in (None, "", ())}
    return always | given | (usage if record.prompt_tokens else {})


def _fail(span: Span, error: str) -> None:
    if error:
        from opentelemetry.trace import Status, StatusCode

        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR))

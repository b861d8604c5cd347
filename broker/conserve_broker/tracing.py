"""Spans of the broker through OpenTelemetry, in the traces of its callers. Needs the extra `otel`.

A grant is a span of the caller's trace (`traceparent`), with the placement and the wait for admission as its children;
a batch of reports is a span as well. Names and attributes stand in docs/observability.md. Nothing here sees a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from conserve_broker.service import Observer
from conserve_broker.settings import ConfigProblem
from conserve_sdk._desk import Reply
from conserve_sdk.protocol import BatchAnswer, LeaseGrant, Problem

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

__all__ = ["Tracing"]

SCOPE = "conserve_broker"
_SPANS = {
    "request_lease": "conserve grant",
    "supersede_lease": "conserve supersede",
    "take_reports": "conserve reports",
}
_PLACING = frozenset({"request_lease", "supersede_lease"})


class Tracing(Observer):
    """Makes the spans.

    Args:
        provider: OpenTelemetry's global one when None.

    Raises:
        ConfigProblem: `opentelemetry-api` is not installed.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        try:
            from opentelemetry import trace
        except ModuleNotFoundError as missing:
            raise ConfigProblem(
                ["watch.tracing: 'otel' needs opentelemetry-api: pip install 'conserve-sdk[otel]'"]
            ) from missing
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=provider)

    @contextmanager
    def request(self, route: str, headers: Mapping[str, str]) -> Iterator[RequestSpan | None]:
        """The span of one request, current while it lasts; None for routes that are too many to be traced."""
        if route not in _SPANS:
            yield None
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers)
        with self._tracer.start_as_current_span(_SPANS[route], context=parent, kind=SpanKind.SERVER) as span:
            yield RequestSpan(span)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The span of the wait for admission, a child of the request's."""
        with self._tracer.start_as_current_span("conserve wait"):
            yield

    def handled(self, route: str, seconds: float) -> None:
        """See `Observer.handled`: the desk has just placed what the current request asks for."""
        if route not in _PLACING:
            return
        now_ns = time.time_ns()
        span = self._tracer.start_span("conserve place", start_time=now_ns - round(seconds * 1e9))
        span.end(end_time=now_ns)


class RequestSpan:
    """A request that is being served."""

    def __init__(self, span: Span) -> None:
        self._span = span
        context = span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}" if context.is_valid else ""

    def answered(self, reply: Reply) -> None:
        """Say on the span what came of it."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("http.response.status_code", reply.status)
        match reply.body:
            case LeaseGrant() as grant:
                self._span.set_attributes(_of_grant(grant))
            case BatchAnswer() as batch:
                self._span.set_attribute("conserve.reports", len(batch.results))
            case Problem() as problem:
                self._span.set_attribute("error.type", problem.code)
                if reply.status >= 500:
                    self._span.set_status(Status(StatusCode.ERROR))
            case _:
                pass


def _of_grant(grant: LeaseGrant) -> dict[str, str | int | float | bool]:
    prefiller = {"conserve.prefiller": grant.prefiller.engine_id} if grant.prefiller is not None else {}
    return {
        "conserve.lease.id": grant.lease_id,
        "conserve.lease.epoch": grant.epoch,
        "conserve.lease.wait": grant.decision.waited_ms / 1000,
        "conserve.lease.reused": grant.reused,
        "conserve.tenant": grant.tenant,
        "gen_ai.conversation.id": grant.conversation_id,
        "gen_ai.request.model": grant.model,
        "conserve.lineage": grant.lineage,
        "conserve.mode": grant.mode,
        "conserve.decoder": grant.decoder.engine_id,
        "conserve.rule": grant.decision.rule,
        "conserve.prefill_rule": grant.decision.prefill_rule,
        **prefiller,
    }

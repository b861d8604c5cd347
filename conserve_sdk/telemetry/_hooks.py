"""The hooks that need nothing but the standard library: a log line per turn, and a list of all turns."""

from __future__ import annotations

import logging
import threading

from conserve_sdk.telemetry._record import TurnRecord, percentile

__all__ = ["LoggingHook", "TurnCollector"]


class LoggingHook:
    """The default hook: one line per turn on the logger `conserve_sdk.turn`.

    Good turns at DEBUG, a loss (a fallback, a failover) at INFO, an error at WARNING.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("conserve_sdk.turn")

    def __call__(self, record: TurnRecord, /) -> None:
        """Log the record."""
        level = logging.WARNING if record.error else logging.INFO if record.loss else logging.DEBUG
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "turn_finished %s", _as_fields(record))


class TurnCollector:
    """A hook that keeps every record, for demos and tests. Thread-safe; memory grows with the turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[TurnRecord] = []

    def __call__(self, record: TurnRecord, /) -> None:
        """Keep the record."""
        with self._lock:
            self._records.append(record)

    @property
    def records(self) -> tuple[TurnRecord, ...]:
        """All records so far, in the order in which the turns ended."""
        with self._lock:
            return tuple(self._records)

    def clear(self) -> None:
        """Forget all records."""
        with self._lock:
            self._records.clear()

    def ttft_ms(self, percent: float) -> float | None:
        """Return that percentile of the times to first token, None without any."""
        return percentile((r.ttft_ms for r in self.records if r.ttft_ms is not None), percent)

    def ttfet_ms(self, percent: float) -> float | None:
        """Return that percentile of the times to first effective token, None without any."""
        return percentile((r.ttfet_ms for r in self.records if r.ttfet_ms is not None), percent)

    def tbt_ms(self, percent: float) -> float | None:
        """Return that percentile over all times between tokens, None without any."""
        microseconds = percentile((gap for r in self.records for gap in r.tbt_us), percent)
        return None if microseconds is None else microseconds / 1000


def _as_fields(record: TurnRecord) -> str:
    shown = {
        "conversation_id": record.conversation_id,
        "lineage": record.lineage,
        "turn": record.turn,
        "lease_id": record.lease_id,
        "decoder_id": record.decoder_id,
        "prefill_engine_id": record.prefill_engine_id,
        "mode": record.mode,
        "ttft_ms": record.ttft_ms,
        "ttfet_ms": record.ttfet_ms,
        "duration_ms": record.duration_ms,
        "lease_wait_ms": record.lease_wait_ms,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "finish_reason": record.finish_reason,
        "loss": record.loss,
        "error": record.error,
    }
    return " ".join(f"{name}={value}" for name, value in shown.items() if value not in (None, ""))

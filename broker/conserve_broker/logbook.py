"""What the broker writes to its log: one event per decision, ids and numbers only, never text of a prompt.

The events go through the standard library's logger ``conserve.broker``, so that whoever embeds the broker decides by
the ordinary means what is shown; `conserve broker` shows them from INFO up.
"""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

import structlog

from conserve_sdk._desk import Outcome
from conserve_sdk.core.decisions import EngineStateChanged, Granted, LeaseDropped, Refused, Waiting
from conserve_sdk.core.events import LeaseRequested, SupersedeRequested
from conserve_sdk.core.lease import LeaseKey
from conserve_sdk.core.units import RequestId
from conserve_sdk.core.vocabulary import DropReason, EngineState

__all__ = ["FIELDS_OF_RECORD", "LOGGER_NAME", "JsonFormatter", "Log", "Logbook", "logger", "trace_id"]

LOGGER_NAME = "conserve.broker"

FIELDS_OF_RECORD = "conserve"
"""Attribute of a log record that holds the event and its fields, for formatters that want more than the message."""

trace_id: ContextVar[str] = ContextVar("trace_id", default="")
"""The trace (W3C, 32 hex digits) of the request in hand; empty when its caller sent none."""

Log = structlog.stdlib.BoundLogger


def logger() -> Log:
    """The broker's logger: ``event key=value ...`` in one line, dropped early below the level in force."""
    return cast(
        "Log",
        structlog.wrap_logger(
            logging.getLogger(LOGGER_NAME),
            wrapper_class=structlog.stdlib.BoundLogger,
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.processors.format_exc_info,
                _as_record,
            ],
        ).bind(),  # once, and not at every question whether a level is shown
    )


_render = structlog.processors.KeyValueRenderer(key_order=["event"])


def _as_record(log: object, name: str, fields: structlog.typing.EventDict) -> tuple[tuple[str], dict[str, object]]:
    """The event as the message of a log record, and once more as it was."""
    told = dict(fields)
    return (str(_render(log, name, fields)),), {"extra": {FIELDS_OF_RECORD: told}}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `event`, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback stands under `exception`."""
        fields = getattr(record, FIELDS_OF_RECORD, None) or {"event": record.getMessage()}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": fields["event"],
            **fields,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({key: value for key, value in line.items() if value is not None}, default=str)


class Logbook:
    """Writes what was decided, with the ids of whom it concerns. Remembers of those who wait who they are."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting: dict[RequestId, _Asker] = {}

    def write(self, outcome: Outcome) -> None:
        """Log what came of one request or event; answers to renewals and reports are too many to be news."""
        for decision in outcome.decisions:
            match decision:
                case Granted(reused=False):
                    self._granted(decision)
                case Granted():
                    self._waiting.pop(decision.request_id, None)
                case Refused():
                    self._refused(decision, outcome)
                case Waiting():
                    self._waits(decision, outcome)
                case LeaseDropped():
                    self._dropped(decision)
                case EngineStateChanged():
                    self._engine(decision)
                case _:
                    pass

    def forget(self, request_id: RequestId) -> None:
        """A request that waited went away."""
        self._waiting.pop(request_id, None)

    def _granted(self, granted: Granted) -> None:
        lease = granted.lease
        asker = self._waiting.pop(granted.request_id, None)
        if not self._log.isEnabledFor(logging.INFO):
            return  # collecting what nobody reads would cost as much as the decision
        self._log.info(
            "lease_granted",
            lease_id=lease.lease_id,
            epoch=lease.epoch,
            **_whose(lease.key, trace_id.get() if asker is None else asker.trace_id),
            mode=lease.mode.value,
            decoder=lease.decoder.engine_id,
            prefiller=lease.prefiller.engine_id if lease.prefiller else None,
            need_tokens=lease.receipt.need_tokens,
            waited_ms=lease.receipt.waited_ms,
            rule=lease.receipt.rule,
            supersedes=lease.supersedes,
        )

    def _refused(self, refused: Refused, outcome: Outcome) -> None:
        asker = self._waiting.pop(refused.request_id, None) or _asker(refused.request_id, outcome)
        self._log.warning(
            "lease_refused",
            request_id=refused.request_id,
            **asker.fields(),
            reason=refused.reason.value,
            need_tokens=refused.receipt.need_tokens,
            waited_ms=refused.receipt.waited_ms,
        )

    def _waits(self, waiting: Waiting, outcome: Outcome) -> None:
        asker = self._waiting[waiting.request_id] = _asker(waiting.request_id, outcome)
        self._log.info("lease_waiting", request_id=waiting.request_id, **asker.fields(), position=waiting.position)

    def _dropped(self, dropped: LeaseDropped) -> None:
        lost = dropped.reason not in {DropReason.RELEASED, DropReason.EXPIRED, DropReason.SUPERSEDED}
        lease = dropped.lease
        self._log.log(
            logging.WARNING if lost else logging.INFO,
            "lease_dropped",
            lease_id=lease.lease_id,
            **_whose(lease.key, ""),
            reason=dropped.reason.value,
            decoder=lease.decoder.engine_id,
            turns=lease.turns,
            ledger_tokens=lease.ledger_tokens,
        )

    def _engine(self, change: EngineStateChanged) -> None:
        fine = change.after in {EngineState.READY, EngineState.DRAINING}
        self._log.log(
            logging.INFO if fine else logging.WARNING,
            "engine_state",
            engine_id=change.engine_id,
            before=change.before.value,
            after=change.after.value,
            incarnation=change.incarnation,
            detail=change.detail,
        )


@dataclass(frozen=True, slots=True)
class _Asker:
    key: LeaseKey | None
    trace_id: str

    def fields(self) -> dict[str, str]:
        return _whose(self.key, self.trace_id)


def _asker(request_id: RequestId, outcome: Outcome) -> _Asker:
    """Whose a request of this outcome is; its caller's trace is the one in hand."""
    for event in outcome.events:
        if isinstance(event, LeaseRequested | SupersedeRequested) and event.request_id == request_id:
            return _Asker(event.key, trace_id.get())
    return _Asker(None, "")


def _whose(key: LeaseKey | None, trace: str) -> dict[str, str]:
    ids = {} if key is None else {"tenant": key.tenant, "conversation_id": key.conversation_id, "lineage": key.lineage}
    return {**ids, "trace_id": trace} if trace else ids

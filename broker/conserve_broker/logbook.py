"""What the broker writes to its log: one event per decision, ids and numbers only, never text of a prompt.

The events go through the standard library's logger ``conserve.broker``, so that whoever embeds the broker decides by
the ordinary means what is shown; `conserve broker` shows them from INFO up.
"""

from __future__ import annotations

import logging
from typing import cast

import structlog

from conserve_sdk.core.events import (
    Decision,
    DropReason,
    EngineState,
    EngineStateChanged,
    Granted,
    LeaseDropped,
    Refused,
    Waiting,
)

__all__ = ["LOGGER_NAME", "Log", "logger", "write_decisions"]

LOGGER_NAME = "conserve.broker"

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
                structlog.processors.KeyValueRenderer(key_order=["event"]),
            ],
        ),
    )


def write_decisions(log: Log, decisions: tuple[Decision, ...]) -> None:
    """Log what the core decided; answers to renewals and reports are too many to be news."""
    for decision in decisions:
        match decision:
            case Granted(reused=False):
                _granted(log, decision)
            case Refused():
                log.warning(
                    "lease_refused",
                    request_id=decision.request_id,
                    reason=decision.reason.value,
                    need_tokens=decision.receipt.need_tokens,
                    waited_ms=decision.receipt.waited_ms,
                )
            case Waiting():
                log.info("lease_waiting", request_id=decision.request_id, position=decision.position)
            case LeaseDropped():
                _dropped(log, decision)
            case EngineStateChanged():
                _engine(log, decision)
            case _:
                pass


def _granted(log: Log, granted: Granted) -> None:
    lease = granted.lease
    log.info(
        "lease_granted",
        lease_id=lease.lease_id,
        epoch=lease.epoch,
        mode=lease.mode.value,
        decoder=lease.decoder.engine_id,
        prefiller=lease.prefiller.engine_id if lease.prefiller else None,
        need_tokens=lease.receipt.need_tokens,
        waited_ms=lease.receipt.waited_ms,
        rule=lease.receipt.rule,
        supersedes=lease.supersedes,
    )


def _dropped(log: Log, dropped: LeaseDropped) -> None:
    lost = dropped.reason not in {DropReason.RELEASED, DropReason.EXPIRED, DropReason.SUPERSEDED}
    log.log(
        logging.WARNING if lost else logging.INFO,
        "lease_dropped",
        lease_id=dropped.lease.lease_id,
        reason=dropped.reason.value,
        decoder=dropped.lease.decoder.engine_id,
        turns=dropped.lease.turns,
        ledger_tokens=dropped.lease.ledger_tokens,
    )


def _engine(log: Log, change: EngineStateChanged) -> None:
    fine = change.after in {EngineState.READY, EngineState.DRAINING}
    log.log(
        logging.INFO if fine else logging.WARNING,
        "engine_state",
        engine_id=change.engine_id,
        before=change.before.value,
        after=change.after.value,
        incarnation=change.incarnation,
        detail=change.detail,
    )

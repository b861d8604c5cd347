"""Words that events, decisions and views share: roles, states, reasons and verdicts, with their stable codes."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """What an engine may be used for."""

    PREFILLER = "prefiller"
    DECODER = "decoder"
    BOTH = "both"


class EngineState(StrEnum):
    """How the broker sees an engine. Only `READY` engines get new leases."""

    UNKNOWN = "unknown"
    """Configured, never observed."""
    READY = "ready"
    DRAINING = "draining"
    SUSPECT = "suspect"
    """Scrapes fail, but not for long enough to call it gone."""
    GONE = "gone"
    MISFIT = "misfit"
    """Answers, but serves another model or block size than its configuration or transfer group."""


class RefusalReason(StrEnum):
    """Stable codes of a refused grant."""

    NO_CAPACITY = "no_capacity"
    NO_READY_ENGINE = "no_ready_engine"
    UNKNOWN_MODEL = "unknown_model"
    PROMPT_TOO_LONG = "prompt_too_long"
    QUEUE_FULL = "queue_full"
    OVER_QUOTA = "over_quota"
    TOO_MANY_LEASES = "too_many_leases"


class LeaseVerdict(StrEnum):
    """What became of a renewal, report, park or release."""

    OK = "ok"
    UNKNOWN = "unknown"
    """No live lease of that id (never granted here, released, or expired: no resurrection)."""
    SUPERSEDED = "superseded"
    ENGINE_LOST = "engine_lost"
    """The lease's decoder restarted or is gone: the KV cache is lost, ask for a new lease."""


class SupersedeCause(StrEnum):
    """Why a holder asks for another lease."""

    FAILURE = "failure"
    """The decoder could not answer."""
    RE_LEASE = "re_lease"
    """The broker's directive is being followed."""
    APPEND = "append"
    """The next turn brings more new tokens than `append_threshold_tokens`."""


class Directive(StrEnum):
    """What a holder is told to do before its next turn."""

    NONE = "none"
    RE_LEASE = "re_lease"


class MoveReason(StrEnum):
    """Why a lease should move to another decoder."""

    DRAINING = "draining"
    LOAD = "load"


class DropReason(StrEnum):
    """Why a lease left the table."""

    RELEASED = "released"
    EXPIRED = "expired"
    SUPERSEDED = "superseded"
    ENGINE_RESTARTED = "engine_restarted"
    ENGINE_GONE = "engine_gone"
    """The decoder stopped answering for `gone_after_ms`."""
    ENGINE_REMOVED = "engine_removed"

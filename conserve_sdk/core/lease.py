"""The lease: what binds one prefiller (or none) and one decoder to one lineage of a conversation.

A lease's engines never change. Another decoder means another lease with ``epoch + 1`` that supersedes this one
(etcd's ``server/lease`` for the verbs; DESIGN section 4 for what they mean here).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from conserve_sdk.core._quick import quick_copy, quick_init
from conserve_sdk.core.receipt import Receipt
from conserve_sdk.core.units import (
    ConversationId,
    EngineId,
    Incarnation,
    LeaseId,
    LineageId,
    ModelName,
    Ms,
    TenantId,
    Tokens,
)


class Mode(StrEnum):
    """Where the first turn is prefilled."""

    MIGRATE = "migrate"
    """On the prefiller; its KV cache then moves once to the decoder."""
    LOCAL = "local"
    """On the decoder itself; nothing moves."""


class Activity(StrEnum):
    """What the conversation is doing as far as the broker was told."""

    BUSY = "busy"
    IDLE = "idle"
    PARKED = "parked"


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class LeaseKey:
    """Identifies the holder: one live lease per key (invariant 5)."""

    tenant: TenantId
    conversation_id: ConversationId
    lineage: LineageId
    model: ModelName


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBinding:
    """One engine as a lease names it: where it was and which incarnation it was at the grant."""

    engine_id: EngineId
    url: str
    incarnation: Incarnation


@lru_cache(maxsize=4_096)
def binding_of(engine_id: EngineId, url: str, incarnation: Incarnation) -> EngineBinding:
    """An engine as leases name it, one object for all of them: there are few engines and many leases."""
    return EngineBinding(engine_id=engine_id, url=url, incarnation=incarnation)


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One live lease. Replaced as a whole on every change, never mutated in place.

    Attributes:
        ledger_tokens: KV tokens this lease holds on its decoder: the promise at grant (first-turn input plus the
            growth reserve), the exact context after each report.
        migrations: 1 once the single KV transfer was reported, else 0.
        hold_ms: how long the decoder is asked to keep a finished turn's blocks; 0 for "do not hold".
        append_threshold_tokens: before an append of more new tokens than this the holder asks again; 0: never.
        expires_at_ms: first instant at which the lease no longer lives.
    """

    lease_id: LeaseId
    key: LeaseKey
    epoch: int
    mode: Mode
    prefiller: EngineBinding | None
    decoder: EngineBinding
    granted_at_ms: Ms
    ttl_ms: Ms
    expires_at_ms: Ms
    ledger_tokens: Tokens
    hold_ms: Ms
    append_threshold_tokens: Tokens
    supersedes: LeaseId | None
    receipt: Receipt
    activity: Activity = Activity.BUSY
    activity_since_ms: Ms
    turns: int = 0
    migrations: int = 0

    def names_engine(self, engine_id: str) -> bool:
        """Whether it binds this engine, as prefiller or decoder."""
        return engine_id == self.decoder.engine_id or (
            self.prefiller is not None and engine_id == self.prefiller.engine_id
        )

    def until(self, expires_at_ms: Ms) -> Lease:
        """The same lease with another end."""
        return _until(self, expires_at_ms)

    def after(
        self,
        *,
        expires_at_ms: Ms,
        activity: Activity,
        activity_since_ms: Ms,
        ledger_tokens: Tokens,
        turns: int,
        migrations: int,
    ) -> Lease:
        """The lease after a change of anything that may change."""
        return _after(self, expires_at_ms, activity, activity_since_ms, ledger_tokens, turns, migrations)


_until = quick_copy(Lease, "expires_at_ms")
_after = quick_copy(Lease, "expires_at_ms", "activity", "activity_since_ms", "ledger_tokens", "turns", "migrations")

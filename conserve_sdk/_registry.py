"""The leases this process holds, by (conversation, lineage, model). Thread-safe; time comes in as monotonic ms."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from conserve_sdk.core.units import ConversationId, EngineId, LeaseId, LineageId, ModelName
from conserve_sdk.protocol import LeaseGrant, LeaseStatus

__all__ = ["FirstTurnClaim", "LeaseRef", "LeaseRegistry", "LeaseView", "TurnSlot"]


class LeaseRef(NamedTuple):
    """Key of an entry: the lease key without its tenant, which the broker derives from the API key."""

    conversation_id: ConversationId
    lineage: LineageId
    model: ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseView:
    """Snapshot of one entry.

    Attributes:
        grant: the newest grant (with the newest token), kept after its end too: its decoder is a hint then, and its
            token is what a supersede needs.
        live: whether turns may use it: neither expired nor lost.
        lost: why it was lost: empty, `unknown`, `superseded`, `engine_lost`, `bad_token` (the broker's verdict) or
            what the caller of `mark_lost` said.
        migrated: whether its single KV transfer is done (or was given up).
        turns: turns begun in the lineage so far.
    """

    ref: LeaseRef
    grant: LeaseGrant | None
    live: bool
    lost: str
    migrated: bool
    turns: int

    @property
    def hint_engine_id(self) -> EngineId | None:
        """The last decoder: it may still hold a prefix."""
        return EngineId(self.grant.decoder.engine_id) if self.grant else None


class TurnSlot(NamedTuple):
    """A turn that began.

    Attributes:
        turn: its position in the lineage, from 1.
        loop_arrived_at_ms: when the first turn of the running tool loop arrived.
    """

    turn: int
    loop_arrived_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTurnClaim:
    """Answer to `LeaseRegistry.claim`.

    Attributes:
        leader: True: do the first turn and call `settle`. False: wait for `future`.
        future: this caller's own future (cancelling it disturbs nobody): the grant once the leader's first turn is
            through, or None when the leader gave up (claim again then).
    """

    ref: LeaseRef
    leader: bool
    future: Future[LeaseGrant | None]


class LeaseRegistry:
    """All entries of one ConServe object."""

    def __init__(self, *, entries_max: int = 50_000, jitter: Callable[[], float] | None = None) -> None:
        raise NotImplementedError

    def view(self, ref: LeaseRef, *, now_ms: int) -> LeaseView:
        """Return a snapshot of the entry; an empty one when there is none."""
        raise NotImplementedError

    def views(self, conversation: ConversationId, *, now_ms: int) -> tuple[LeaseView, ...]:
        """Return snapshots of all entries of a conversation."""
        raise NotImplementedError

    def claim(self, ref: LeaseRef) -> FirstTurnClaim:
        """Become the leader of this lineage's first turn, or a follower of the leader there is."""
        raise NotImplementedError

    def settle(self, claim: FirstTurnClaim, grant: LeaseGrant | None) -> None:
        """End the leader's flight and wake its followers. Idempotent; must be called on every path out."""
        raise NotImplementedError

    def store(self, ref: LeaseRef, grant: LeaseGrant, *, sent_at_ms: int) -> LeaseView:
        """Keep a grant. `sent_at_ms`: when its request was sent, from which its life is counted (never too long)."""
        raise NotImplementedError

    def mark_migrated(self, lease_id: LeaseId) -> None:
        """Note that the lease's single KV transfer is done, or given up for good."""
        raise NotImplementedError

    def mark_lost(self, lease_id: LeaseId, reason: str) -> None:
        """Note that the lease is of no more use; the next turn of its lineage asks the broker again."""
        raise NotImplementedError

    def begin_turn(self, ref: LeaseRef, *, arrived_at_ms: int) -> TurnSlot:
        """Count a turn; opens a tool loop if none is running."""
        raise NotImplementedError

    def end_turn(self, ref: LeaseRef, *, now_ms: int, loop_goes_on: bool) -> None:
        """End a turn. `loop_goes_on`: it ended in tool calls (or failed), so another turn of the loop follows."""
        raise NotImplementedError

    def apply_status(self, status: LeaseStatus, *, sent_at_ms: int, lease_id: LeaseId | None = None) -> None:
        """Take in the broker's verdict on a report or renewal: a longer life, a fresh token, or a loss."""
        raise NotImplementedError

    def lease_of_token(self, token: str) -> LeaseId | None:
        """Return the lease whose current token this is."""
        raise NotImplementedError

    def due_renewals(self, *, now_ms: int) -> list[LeaseGrant]:
        """Return the grants to renew now: in use, and past their renewal time."""
        raise NotImplementedError

    def next_renewal_ms(self) -> int | None:
        """Return when the next renewal falls due, None when no lease is in use."""
        raise NotImplementedError

    def drop(self, ref: LeaseRef) -> LeaseGrant | None:
        """Forget an entry and return its grant."""
        raise NotImplementedError

    def forget(self, conversation: ConversationId, *, now_ms: int) -> list[LeaseGrant]:
        """Forget a conversation and return the grants that are live, to be released."""
        raise NotImplementedError

    def live_grants(self, *, now_ms: int) -> list[LeaseGrant]:
        """Return every live grant, to be released at close."""
        raise NotImplementedError

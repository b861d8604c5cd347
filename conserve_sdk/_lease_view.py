"""What the registry of leases is asked with, and what it answers."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from conserve_sdk.core._quick import quick_init
from conserve_sdk.core.units import ConversationId, EngineId, LineageId, ModelName
from conserve_sdk.protocol import Binding, LeaseGrant

__all__ = ["FirstTurnClaim", "LeaseRef", "LeaseView", "ServedTurn", "TurnSlot"]


class LeaseRef(NamedTuple):
    """Key of an entry: the lease key without its tenant, which the broker derives from the API key."""

    conversation_id: ConversationId
    lineage: LineageId
    model: ModelName


class ServedTurn(NamedTuple):
    """What an engine's `usage` said of a lineage's newest turn.

    Attributes:
        decoder: the engine; its cache now holds the tokens.
        prompt_bytes: bytes of the prompt's text: with its tokens, the lineage's own ratio.
    """

    decoder: Binding
    prompt_tokens: int
    completion_tokens: int
    prompt_bytes: int


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseView:
    """Snapshot of one entry.

    Attributes:
        grant: the newest grant (with the newest token), kept after its end too: its decoder is a hint then, and its
            token is what a supersede needs.
        live: whether turns may use it: neither expired nor lost.
        lost: why it was lost: empty, `unknown`, `superseded`, `engine_lost`, `bad_token` (the broker's verdict) or
            what the caller of `mark_lost` said.
        migrated: whether its single KV transfer is done or not due here (local mode, turns were served already, or
            another process was granted it first).
        turns: turns begun in the lineage so far.
        directive: why the broker wants another lease before the lineage's next turn; empty when it does not.
        served: the newest turn whose engine gave its usage, None before.
    """

    ref: LeaseRef
    grant: LeaseGrant | None = None
    live: bool = False
    lost: str = ""
    migrated: bool = False
    turns: int = 0
    directive: str = ""
    served: ServedTurn | None = None

    @property
    def hint_engine_id(self) -> EngineId | None:
        """The last decoder: it may still hold a prefix."""
        return EngineId(self.grant.decoder.engine_id) if self.grant else None

    @property
    def held_tokens(self) -> int:
        """Tokens of the lineage that the lease's decoder is believed to hold, 0 when nothing says so."""
        if self.grant is None or self.served is None or self.served.decoder != self.grant.decoder:
            return 0
        return self.served.prompt_tokens + self.served.completion_tokens


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

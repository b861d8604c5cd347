"""What goes into `Broker.apply`.

Events carry everything that is not the core's to make: the instant (``now_ms``), new ids, observations.
"""

from __future__ import annotations

from dataclasses import dataclass

from conserve_sdk.core._quick import quick_init
from conserve_sdk.core.lease import Lease, LeaseKey
from conserve_sdk.core.units import (
    EngineId,
    Incarnation,
    LeaseId,
    ModelName,
    Ms,
    PrefixKey,
    RequestId,
    Tokens,
    TransferGroup,
)
from conserve_sdk.core.vocabulary import Role, SupersedeCause


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """An engine as configured or registered.

    Attributes:
        transfer_group: engines of one group can move KV to each other; empty when it has no KV connector.
        kv_capacity_tokens: overrides the scraped capacity when not 0.
        block_size_tokens: expected KV block size, checked against the scrape when not 0.
        max_model_len_tokens: longest prompt + output; scraped when 0.
        host_tier_tokens: tokens of KV that the engine can keep in host memory (vLLM: OffloadingConnector) and load
            back; 0: it has no host tier.
        max_hold_ms: the engine's own `kv_lease_duration`: how long it can hold a finished turn's blocks; 0: cannot.
        tier: free name of its hardware class, for reports; decides nothing.
    """

    engine_id: EngineId
    url: str
    role: Role
    model: ModelName
    transfer_group: TransferGroup = TransferGroup("")
    kv_capacity_tokens: Tokens = Tokens(0)
    block_size_tokens: Tokens = Tokens(0)
    max_model_len_tokens: Tokens = Tokens(0)
    max_hold_ms: Ms = Ms(0)
    host_tier_tokens: Tokens = Tokens(0)
    tier: str = ""


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfigured:
    """An engine was added or its configuration changed. Idempotent."""

    now_ms: Ms
    spec: EngineSpec
    draining: bool = False


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRemoved:
    """An engine left the configuration: its leases are dropped (`DropReason.ENGINE_REMOVED`)."""

    now_ms: Ms
    engine_id: EngineId


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineObserved:
    """A successful scrape of `/health`, `/v1/models` and `/metrics`.

    Attributes:
        incarnation: another value than last time means the engine restarted.
        models: names it serves.
        prefill_tokens_total: prompt tokens it computed itself since it started (monotonic counter).
        prefill_busy_ms_total: time it spent on prefill since it started, as far as known (0: unknown).
    """

    now_ms: Ms
    engine_id: EngineId
    incarnation: Incarnation
    models: tuple[ModelName, ...]
    kv_capacity_tokens: Tokens
    kv_used_tokens: Tokens
    block_size_tokens: Tokens
    max_model_len_tokens: Tokens
    running: int
    waiting: int
    prefill_tokens_total: Tokens = Tokens(0)
    prefill_busy_ms_total: Ms = Ms(0)


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUnreachable:
    """A scrape failed, or clients reported the engine as failing."""

    now_ms: Ms
    engine_id: EngineId
    detail: str


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRestarted:
    """An engine says of itself that it lives anew; nothing follows unless its scrapes still show the life before.

    Its leases have lost their KV, and it gets no new one until a scrape tells what it is now.

    Attributes:
        before: what it called its last life, by the name that scrapes derive.
        incarnation: what it calls this one.
    """

    now_ms: Ms
    engine_id: EngineId
    before: Incarnation
    incarnation: Incarnation


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDrained:
    """Drain (`draining=True`) or undrain an engine: draining engines keep their leases but get no new one."""

    now_ms: Ms
    engine_id: EngineId
    draining: bool


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequested:
    """Grant me a lease. Idempotent on the key: a live lease of that key is answered as it is.

    Attributes:
        lease_id: id to use if a new lease is granted.
        first_turn_input_tokens: exact count, or 0 when the client has none.
        first_turn_input_bytes: size of the prompt's text; converted with the observed ratio when tokens are 0.
        deadline_at_ms: until when the request may wait for admission; at or before `now_ms` means "do not wait".
        hint: engine preferred as decoder within the configured slack (the lineage's previous decoder), or None.
        parent_lease_id: lease of the lineage that this one branched off; its decoder is preferred before `hint`.
        prefix_key: preamble that the prompt begins with, or "".
    """

    now_ms: Ms
    request_id: RequestId
    lease_id: LeaseId
    key: LeaseKey
    first_turn_input_tokens: Tokens
    first_turn_input_bytes: int
    deadline_at_ms: Ms
    hint: EngineId | None = None
    parent_lease_id: LeaseId | None = None
    prefix_key: PrefixKey = PrefixKey("")


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class SupersedeRequested:
    """Replace this lease by one with `epoch + 1` (compare-and-set on `epoch`).

    If the live lease of the key already has a higher epoch, that one is answered (ten concurrent failures make one
    new lease). For the causes `RE_LEASE` and `APPEND` the live lease itself may be the answer (`reused`): stay. If
    `lease_id` is no longer live and no other lease of `key` is, the request is a grant with `epoch + 1`.

    Attributes:
        failed_engine_id: engine that must not be chosen again by this request, or None.
        cached_tokens: tokens of the prompt that the lease's decoder is believed to hold.
    """

    now_ms: Ms
    request_id: RequestId
    lease_id: LeaseId
    new_lease_id: LeaseId
    key: LeaseKey
    epoch: int
    reason: str
    first_turn_input_tokens: Tokens
    first_turn_input_bytes: int
    deadline_at_ms: Ms
    failed_engine_id: EngineId | None = None
    cause: SupersedeCause = SupersedeCause.FAILURE
    cached_tokens: Tokens = Tokens(0)


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCancelled:
    """The caller of a waiting request went away."""

    now_ms: Ms
    request_id: RequestId


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRenewed:
    """Extend the lease to `now_ms + ttl_ms`."""

    now_ms: Ms
    lease_id: LeaseId


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LeasesRenewed:
    """Holders are alive: a `LeaseRenewed` for each of these leases, in order, at one instant and for less work.

    Attributes:
        lease_ids: whose; one that is named twice is renewed twice.
    """

    now_ms: Ms
    lease_ids: tuple[LeaseId, ...]


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class TurnStarted:
    """A turn was sent to the engines; counts as a renewal."""

    now_ms: Ms
    lease_id: LeaseId
    input_tokens: Tokens


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFinished:
    """A turn ended; counts as a renewal.

    Attributes:
        context_tokens: exact prompt + completion tokens of the turn (0: unknown, keep the ledger).
        prompt_bytes, prompt_tokens: sizes of the same prompt, to learn the tokens-per-byte ratio (0: unknown).
        cached_tokens: prompt tokens the engine had cached.
        prefill_ms: time of the prefill where known (the prefill leg of a migration, else time to first token);
            0: unknown.
        prefill_engine_id: who prefilled.
        migrated: whether this turn moved KV.
        idle: True when the conversation now waits (tool calls or an answer given), which it does after every turn
            unless another one is already running.
    """

    now_ms: Ms
    lease_id: LeaseId
    context_tokens: Tokens
    prompt_tokens: Tokens
    prompt_bytes: int
    cached_tokens: Tokens
    prefill_ms: Ms
    prefill_engine_id: EngineId | None
    migrated: bool
    idle: bool = True


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFailureReported:
    """A client could not use an engine its lease names (connection refused, 5xx before the first byte)."""

    now_ms: Ms
    engine_id: EngineId
    incarnation: Incarnation
    detail: str


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseParked:
    """The conversation waits for a human: shorten its TTL to the park TTL. KV is never held for a human."""

    now_ms: Ms
    lease_id: LeaseId


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReleased:
    """The conversation is over."""

    now_ms: Ms
    lease_id: LeaseId


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReadopted:
    """A valid, unexpired token of a lease this broker does not know: put the lease back into the ledger.

    Refused when a live lease of the same key has the same or a higher epoch, when the lease was released, expired or
    superseded here, or when its decoder is unknown or another incarnation.
    """

    now_ms: Ms
    lease: Lease


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class JournalFollowed:
    """What another broker, the leader, wrote: a standby's only events, until `Recovered` makes it lead.

    Meanwhile nothing expires, because renewals are not written, and nothing is decided.

    Attributes:
        stored: rows as they are now, of new leases and of changed ones.
        dropped: leases that ended; unknown ones are ignored.
    """

    now_ms: Ms
    stored: tuple[Lease, ...]
    dropped: tuple[LeaseId, ...] = ()


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """Begin to decide, with the journal's leases and those followed; each lives at least until `now_ms + grace_ms`."""

    now_ms: Ms
    leases: tuple[Lease, ...]
    grace_ms: Ms


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFired:
    """`next_deadline_ms()` has come."""

    now_ms: Ms


Event = (
    EngineConfigured
    | EngineRemoved
    | EngineObserved
    | EngineUnreachable
    | EngineRestarted
    | EngineDrained
    | LeaseRequested
    | SupersedeRequested
    | RequestCancelled
    | LeaseRenewed
    | LeasesRenewed
    | TurnStarted
    | TurnFinished
    | EngineFailureReported
    | LeaseParked
    | LeaseReleased
    | LeaseReadopted
    | JournalFollowed
    | Recovered
    | TimerFired
)

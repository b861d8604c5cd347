"""Wire models between SDK and broker: HTTP + JSON under `/v1`, version `PROTOCOL_VERSION`.

Readers ignore unknown fields, so that either side may be newer. Every bound that the broker enforces on what it
reads stands here. Errors are RFC 9457 problem documents (`Problem`) with a stable `code`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PROTOCOL_VERSION = 1

PROBLEM_MEDIA_TYPE = "application/problem+json"

Identifier = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[\x21-\x7e]+$")]
"""Printable ASCII without blanks, at most 256 characters. Clients hash ids that are longer or hold anything else."""

TokenCount = Annotated[int, Field(ge=0, le=100_000_000)]
Millis = Annotated[int, Field(ge=0, le=86_400_000)]

REPORTS_MAX = 500
RENEWALS_MAX = 500
LEASES_LISTED_MAX = 500
BODY_BYTES_MAX = 4 * 1024 * 1024
"""Longest request body the broker reads: a full batch of reports with tokens of the longest allowed size fits."""

LEASE_HEADER = "X-ConServe-Lease"
"""Carries the lease's token on the routes of one lease that have no body (read, release)."""
LEASE_SCHEME = "Lease"
"""`Authorization: Lease <token>`: the same, for brokers whose callers need no API key."""


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Binding(_Wire):
    """One engine as a lease names it.

    Attributes:
        api_key: the engine's own key, from a broker that hands it to agents; None: the application's goes along.
    """

    engine_id: Identifier
    url: str
    incarnation: str
    api_key: str | None = Field(default=None, repr=False)


class LeaseRequest(_Wire):
    """Body of `POST /v1/leases`. Idempotent on (tenant, conversation_id, lineage, model).

    Attributes:
        first_turn_input_tokens: exact count, or 0 when the client has none.
        first_turn_input_bytes: UTF-8 bytes of the prompt's text, for brokers that convert.
        wait_ms: how long the client will wait for admission before it wants a refusal.
        hint_engine_id: decoder that may still hold a prefix of this lineage (previous or parent lease).
        parent_lease_id: lease of the lineage that this one branched off (a sub-agent, a fork after compaction).
        prefix_key: names the preamble the prompt begins with (a hash over system prompt and tools); requests with equal
            keys share their first tokens.
    """

    conversation_id: Identifier
    lineage: Identifier
    model: Identifier
    first_turn_input_tokens: TokenCount = 0
    first_turn_input_bytes: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    wait_ms: Millis = 0
    hint_engine_id: Identifier | None = None
    parent_lease_id: Identifier | None = None
    prefix_key: Identifier | None = None
    client: Annotated[str, Field(max_length=200)] = ""


class SupersedeRequest(_Wire):
    """Body of `POST /v1/leases/{id}/supersede`: compare-and-set on `epoch`.

    The capability is the lease's `token`; a broker that lost its state learns the key from it.

    Attributes:
        cause: `failure`: the decoder could not answer. `re_lease`: the broker's directive is being followed. `append`:
            the next turn brings more new tokens than the lease's `append_threshold_tokens`. After the last two the
            broker may also answer with the live lease as it is (`reused`), which means: stay.
        cached_tokens: tokens of the prompt that the lease's decoder is believed to hold; 0 when it lost them.
    """

    token: Annotated[str, Field(max_length=4096)]
    epoch: Annotated[int, Field(ge=1)]
    reason: Annotated[str, Field(max_length=500)]
    cause: Literal["failure", "re_lease", "append"] = "failure"
    cached_tokens: TokenCount = 0
    first_turn_input_tokens: TokenCount = 0
    first_turn_input_bytes: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    wait_ms: Millis = 0
    failed_engine_id: Identifier | None = None


class CandidateInfo(_Wire):
    """One engine as placement saw it; see `conserve_sdk.core.CandidateView`."""

    engine_id: str
    role: str
    verdict: str
    capacity_tokens: int
    leased_tokens: int
    used_tokens: int
    backlog_tokens: int
    running: int
    rate_tokens_per_s: int
    score_us: int
    active_tokens: int = 0
    prefill_share_ppm: int = 0
    uncached_tokens: int = -1


class DecisionInfo(_Wire):
    """Receipt of a placement; see `conserve_sdk.core.Receipt`.

    Attributes:
        candidates: the engines that were weighed; in explanations and refusals, not in grants.
    """

    preset: str
    rule: str
    prefill_rule: str
    need_tokens: int
    waited_ms: int
    candidates: tuple[CandidateInfo, ...] = ()


class LeaseGrant(_Wire):
    """Answer to a grant, supersede or `GET /v1/leases/{id}`.

    Attributes:
        mode: `migrate` (prefill the first turn on `prefiller`, move its KV once) or `local` (all on `decoder`).
        expires_in_ms: life left when the answer was written; relative, so that clocks need not agree.
        renew_after_ms: renew when this much time has passed (a third of `ttl_ms`).
        hold_ms: ask the decoder to keep a turn's blocks (vLLM: `do_remote_decode` on the decoder); 0: do not.
        append_threshold_tokens: ask again (supersede, cause `append`) before a follow-up turn that brings more new
            tokens than this; 0: never.
        token: capability for renew, report, park, release and supersede of this lease.
        reused: True when the lease was already live (another process, or a repeated request).
    """

    lease_id: Identifier
    epoch: int
    tenant: str
    conversation_id: str
    lineage: str
    model: str
    mode: Literal["migrate", "local"]
    prefiller: Binding | None
    decoder: Binding
    ttl_ms: int
    expires_in_ms: int
    renew_after_ms: int
    hold_ms: int
    append_threshold_tokens: int
    supersedes: str | None
    migrations: int = 0
    turns: int = 0
    activity: Literal["busy", "idle", "parked"] = "busy"
    reused: bool = False
    token: str
    decision: DecisionInfo


class TurnStartedReport(_Wire):
    """A turn was sent. Usually folded into one batch with others; never waited for."""

    kind: Literal["turn_started"] = "turn_started"
    token: Annotated[str, Field(max_length=4096)]
    input_tokens: TokenCount = 0


class TurnFinishedReport(_Wire):
    """A turn ended; see `conserve_sdk.core.TurnFinished` for the fields the ledger uses.

    Attributes:
        error: empty, or the class of failure that ended the turn (`client_cancelled`, `stream_dropped`, ...).
    """

    kind: Literal["turn_finished"] = "turn_finished"
    token: Annotated[str, Field(max_length=4096)]
    prompt_tokens: TokenCount = 0
    completion_tokens: TokenCount = 0
    cached_tokens: TokenCount = 0
    prompt_bytes: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    prefill_ms: Millis = 0
    prefill_engine_id: Identifier | None = None
    migrated: bool = False
    ttft_ms: Millis = 0
    duration_ms: Millis = 0
    finish_reason: Annotated[str, Field(max_length=64)] = ""
    tool_names: Annotated[tuple[Annotated[str, Field(max_length=128)], ...], Field(max_length=64)] = ()
    idle: bool = True
    error: Annotated[str, Field(max_length=200)] = ""


class EngineFailureReport(_Wire):
    """A client could not use an engine that its lease names."""

    kind: Literal["engine_failure"] = "engine_failure"
    token: Annotated[str, Field(max_length=4096)]
    engine_id: Identifier
    incarnation: Annotated[str, Field(max_length=256)]
    phase: Literal["prefill", "transfer", "decode"]
    detail: Annotated[str, Field(max_length=500)] = ""


Report = Annotated[TurnStartedReport | TurnFinishedReport | EngineFailureReport, Field(discriminator="kind")]


class ReportBatch(_Wire):
    """Body of `POST /v1/reports`. Each turn report counts as a renewal of its lease."""

    reports: Annotated[tuple[Report, ...], Field(min_length=1, max_length=REPORTS_MAX)]


class RenewalBatch(_Wire):
    """Body of `POST /v1/renewals`: the tokens of the leases to renew."""

    tokens: Annotated[tuple[Annotated[str, Field(max_length=4096)], ...], Field(min_length=1, max_length=RENEWALS_MAX)]


class LeaseStatus(_Wire):
    """What became of one report or renewal.

    Attributes:
        verdict: `ok`, `unknown` (expired or released: start again with a first turn), `superseded`, `engine_lost`,
            or `bad_token`.
        token: a fresh token when the old one nears its end, else None.
        directive: `re_lease`: before the next turn of the lineage, never inside one, ask for another lease
            (supersede, cause `re_lease`); it moves the KV once. Stands until it is followed or withdrawn by `none`.
        directive_reason: why, for logs: `draining`, `load`.
    """

    lease_id: str
    verdict: Literal["ok", "unknown", "superseded", "engine_lost", "bad_token"]
    expires_in_ms: int = 0
    token: str | None = None
    directive: Literal["none", "re_lease"] = "none"
    directive_reason: Annotated[str, Field(max_length=64)] = ""


class BatchAnswer(_Wire):
    """Answer to a report or renewal batch, in the order of the request."""

    results: tuple[LeaseStatus, ...]


class TokenBody(_Wire):
    """Body of `POST /v1/leases/{id}/park`."""

    token: Annotated[str, Field(max_length=4096)]


class EngineInfo(_Wire):
    """One engine in `GET /v1/engines` and `GET /v1/fleet`."""

    engine_id: str
    url: str
    role: Literal["prefiller", "decoder", "both"]
    model: str
    state: Literal["unknown", "ready", "draining", "suspect", "gone", "misfit"]
    detail: str
    incarnation: str | None
    transfer_group: str
    kv_capacity_tokens: int
    kv_used_tokens: int
    kv_leased_tokens: int
    leases: int
    running: int
    waiting: int
    backlog_tokens: int
    prefill_rate_tokens_per_s: int
    observed_ago_ms: int | None
    block_size_tokens: int = 0
    max_model_len_tokens: int = 0
    draining: bool = False
    kv_active_tokens: int = 0
    host_tier_tokens: int = 0
    prefill_share_ppm: int = 0
    lost_caches: int = 0
    tier: str = ""
    busy: int = 0
    """Of `leases`, those that are in a turn."""


class EngineRegistration(_Wire):
    """Body of `PUT /v1/engines/{id}`: an engine announces itself, and repeats it before `ttl_ms` are over.

    Attributes:
        url: base URL without `/v1`, as the agents reach it; the broker's allow-list decides whether it may be.
        connector: `none` for an engine started without `--kv-transfer-config`.
        transfer_group, max_hold_ms: the broker's defaults for the connector when None.
        tier: free name of its hardware class, for reports.
        host_tier_tokens: KV that it can keep in host memory; 0: none.
        incarnation: its own word for this life, by the name that the broker's scrapes derive of it; another one than
            before ends the leases of the life before at once.
        ttl_ms: how long this word counts.
    """

    url: Annotated[str, Field(min_length=1, max_length=512)]
    role: Literal["prefiller", "decoder", "both"]
    model: Identifier
    connector: Literal["nixl", "none"] = "nixl"
    transfer_group: Annotated[str, Field(max_length=64)] | None = None
    block_size_tokens: Annotated[int, Field(ge=0, le=65_536)] = 0
    kv_capacity_tokens: TokenCount = 0
    max_model_len_tokens: TokenCount = 0
    max_hold_ms: Annotated[int, Field(ge=0, le=3_600_000)] | None = None
    tier: Annotated[str, Field(max_length=64)] = ""
    host_tier_tokens: TokenCount = 0
    incarnation: Annotated[str, Field(max_length=128)] = ""
    ttl_ms: Annotated[int, Field(ge=1_000, le=600_000)] = 15_000


class EngineList(_Wire):
    """Answer to `GET /v1/engines`, ordered by id."""

    engines: tuple[EngineInfo, ...]


class LeaseQuery(_Wire):
    """Query of `GET /v1/leases`; what is not given does not filter.

    Attributes:
        engine_id: decoder or prefiller.
        min_age_ms, max_age_ms: time since the grant.
        limit: leases in one answer at most. The broker also bounds how many it looks at, so an answer may hold fewer,
            even none, and still name a `next_cursor`.
        cursor: `next_cursor` of the answer before.
    """

    state: Literal["busy", "idle", "parked"] | None = None
    engine_id: Identifier | None = None
    tenant: Identifier | None = None
    conversation_id: Identifier | None = None
    model: Identifier | None = None
    min_age_ms: Annotated[int, Field(ge=0, le=10_000_000_000)] = 0
    max_age_ms: Annotated[int, Field(ge=0, le=10_000_000_000)] | None = None
    limit: Annotated[int, Field(ge=1, le=LEASES_LISTED_MAX)] = 100
    cursor: Annotated[str, Field(pattern=r"^([0-9]{1,12}-[0-9]{1,15})?$")] = ""


class LeaseSummary(_Wire):
    """One live lease in `GET /v1/leases`. No token.

    Attributes:
        prefiller, decoder: engine ids.
        state_for_ms: how long it has been `state`.
        rule: why this decoder; the whole receipt is at `/v1/leases/{id}/explain`.
    """

    lease_id: str
    epoch: int
    tenant: str
    conversation_id: str
    lineage: str
    model: str
    mode: Literal["migrate", "local"]
    prefiller: str | None
    decoder: str
    state: Literal["busy", "idle", "parked"]
    state_for_ms: int
    granted_ago_ms: int
    expires_in_ms: int
    ledger_tokens: int
    turns: int
    migrations: int
    rule: str


class LeaseList(_Wire):
    """Answer to `GET /v1/leases`, in the order in which the leases went live.

    A lease that lives from the first page to the last is in one of them at least; it may be in two when others end
    meanwhile.

    Attributes:
        live: live leases altogether, whatever the query.
        next_cursor: None after the last page.
    """

    leases: tuple[LeaseSummary, ...]
    live: int
    next_cursor: str | None


class LeaseExplanation(_Wire):
    """Answer to `GET /v1/leases/{id}/explain`: why the lease stands where it does, and how it does now. No token.

    Attributes:
        decision: the receipt of the placement, with the numbers as they were then.
        decoder_now: the decoder as the broker sees it now; None when it left the fleet.
        in_words: the same in sentences.
    """

    lease_id: str
    epoch: int
    tenant: str
    conversation_id: str
    lineage: str
    model: str
    mode: Literal["migrate", "local"]
    prefiller: Binding | None
    decoder: Binding
    granted_ago_ms: int
    expires_in_ms: int
    ttl_ms: int
    hold_ms: int
    ledger_tokens: int
    activity: Literal["busy", "idle", "parked"]
    activity_for_ms: int
    turns: int
    migrations: int
    supersedes: str | None
    decision: DecisionInfo
    decoder_now: EngineInfo | None
    prefiller_now: EngineInfo | None
    in_words: tuple[str, ...] = ()


class FleetInfo(_Wire):
    """Answer to `GET /v1/fleet`."""

    protocol_version: int = PROTOCOL_VERSION
    preset: str
    engines: tuple[EngineInfo, ...]
    leases: int
    waiting_requests: int
    migrations_total: int
    grants_total: int


class FindingInfo(_Wire):
    """One observation and what follows from it; `code` is stable."""

    code: str
    text: str


class ModelAdvice(_Wire):
    """What one model's figures call for; see `conserve_sdk.core.Advice`. Zero prefillers: do not disaggregate."""

    model: str
    preset: str
    prefillers: int
    decoders: int
    sure: bool
    engines_ready: int
    prefillers_now: int
    kv_active_ppm: int
    prefill_work_ppm: int
    grants: int
    wait_p95_ms: int
    first_turn_p50_tokens: int
    waiting: int
    findings: tuple[FindingInfo, ...]


class AdviceInfo(_Wire):
    """Answer to `GET /v1/advice`, ordered by model; `preset` is the one in force."""

    preset: str
    models: tuple[ModelAdvice, ...]


class Problem(_Wire):
    """RFC 9457 problem document. `code` is stable; `detail` says what to do."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    retry_after_ms: int | None = None
    decision: DecisionInfo | None = None
    leader_url: str | None = None
    """With `not_leader`: where the leading broker answers, when it is known."""

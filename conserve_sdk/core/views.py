"""What others may read of the broker: one frozen view per engine, and counters."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from conserve_sdk.core._quick import quick_init
from conserve_sdk.core.events import EngineSpec
from conserve_sdk.core.lease import LeaseKey
from conserve_sdk.core.receipt import CandidateView
from conserve_sdk.core.units import MILLION, EngineId, Incarnation, Ms, Ppm, RequestId, Tokens
from conserve_sdk.core.vocabulary import EngineState, MoveReason, RefusalReason, SupersedeCause


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """One engine as the broker sees it now. Placement reads nothing else.

    Attributes:
        spec: its configuration.
        state: only `READY` engines get new leases.
        detail: why the state is what it is, and what to do about it; empty when `READY`.
        draining: whether draining was asked for, whatever the state.
        incarnation: as last observed; None before the first observation.
        observed_at_ms: instant of the last successful scrape; None before the first.
        kv_capacity_tokens: configured, else observed capacity; 0 while unknown.
        kv_used_tokens: KV occupancy last scraped.
        kv_leased_tokens: sum of the live leases' ledgers.
        kv_active_tokens: the part of `kv_leased_tokens` whose leases are active; all of it without a host tier.
        kv_holding_tokens: the part of `kv_leased_tokens` whose leases ask the engine to hold blocks between turns.
        leases: live leases that name it as decoder.
        busy: how many of those are in a turn.
        running, waiting: requests in the engine's own scheduler, last scraped.
        prefill_share_ppm: share of its time with prefill work, averaged; 1 on a prefiller until observed otherwise.
        lost_caches: follow-up turns that found far less of their KV here than the ledger said, since the last restart.
        lost_share_ppm: share of recent follow-up turns that did.
        backlog_tokens: uncached prompt tokens dispatched to it whose first token was not yet seen.
        rate_tokens_per_s: observed prefill rate, or the configured default.
        block_size_tokens, max_model_len_tokens: observed, else configured; 0 while unknown.
    """

    spec: EngineSpec
    state: EngineState
    detail: str = ""
    draining: bool = False
    incarnation: Incarnation | None = None
    observed_at_ms: Ms | None = None
    kv_capacity_tokens: Tokens = Tokens(0)
    kv_used_tokens: Tokens = Tokens(0)
    kv_leased_tokens: Tokens = Tokens(0)
    kv_active_tokens: Tokens = Tokens(0)
    kv_holding_tokens: Tokens = Tokens(0)
    prefill_share_ppm: Ppm = Ppm(MILLION)
    lost_caches: int = 0
    lost_share_ppm: Ppm = Ppm(0)
    leases: int = 0
    busy: int = 0
    running: int = 0
    waiting: int = 0
    backlog_tokens: Tokens = Tokens(0)
    rate_tokens_per_s: int = 1
    block_size_tokens: Tokens = Tokens(0)
    max_model_len_tokens: Tokens = Tokens(0)
    derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What was made of this view alone and is the same whenever it is made; kept as long as the view."""

    @property
    def engine_id(self) -> EngineId:
        """The engine's id."""
        return self.spec.engine_id

    def observed_within(self, max_age_ms: Ms, *, now_ms: Ms) -> bool:
        """Whether the last observation is at most this old (invariant 6)."""
        return self.observed_at_ms is not None and now_ms - self.observed_at_ms <= max_age_ms

    def as_candidate(self, role: str, verdict: str, score_us: int = -1, uncached_tokens: int = -1) -> CandidateView:
        """Its line in a receipt. Lines without a score are shared between receipts, which keeps leases small."""
        line: CandidateView | None = self.derived.get((role, verdict)) if score_us < 0 else None
        if line is None:
            line = CandidateView(
                engine_id=self.spec.engine_id,
                role=role,
                verdict=verdict,
                capacity_tokens=self.kv_capacity_tokens,
                leased_tokens=self.kv_leased_tokens,
                used_tokens=self.kv_used_tokens,
                backlog_tokens=self.backlog_tokens,
                running=self.running,
                rate_tokens_per_s=self.rate_tokens_per_s,
                score_us=score_us,
                active_tokens=self.kv_active_tokens,
                prefill_share_ppm=self.prefill_share_ppm,
                uncached_tokens=uncached_tokens,
            )
            if score_us < 0:
                self.derived[role, verdict] = line
        return line


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingRequest:
    """A request that waits for admission.

    Attributes:
        need_tokens: input of its first turn, counted or estimated.
        asked_at_ms: instant of its arrival.
        deadline_at_ms: first instant at which it no longer waits.
    """

    request_id: RequestId
    key: LeaseKey
    need_tokens: Tokens
    asked_at_ms: Ms
    deadline_at_ms: Ms


def _no_refusals() -> dict[RefusalReason, int]:
    return dict.fromkeys(RefusalReason, 0)


def _no_moves() -> dict[MoveReason, int]:
    return dict.fromkeys(MoveReason, 0)


def _no_stays() -> dict[SupersedeCause, int]:
    return dict.fromkeys(SupersedeCause, 0)


@dataclass(slots=True, kw_only=True)
class BrokerCounters:
    """Totals since the broker started.

    Attributes:
        granted: new leases, those that supersede another included.
        reused: requests answered with a lease that was already live.
        readopted: leases put back by their token.
        superseded, released, expired: leases that ended so.
        parked, renewed: answered with OK.
        migrations: leases whose one KV transfer was reported.
        engine_restarts: changes of incarnation seen.
        queued: requests that had to wait for admission, however that ended.
        spilled: grants whose prompt the decoder prefills because every usable prefiller would have taken longer.
        failed_over: grants in place of a lease whose decoder its holder could not use.
        refused: by reason.
        decoder_rules, prefill_rules: grants by the rules of their receipts.
        directives: re-lease directives announced, by reason; `withdrawn`: taken back before they were followed.
        moved: directives carried out, by reason.
        stayed: supersede requests answered with the live lease, by cause: moving was not worth it.
        lost_caches: follow-up turns that found far less of their KV than the ledger said.
    """

    granted: int = 0
    reused: int = 0
    readopted: int = 0
    superseded: int = 0
    released: int = 0
    expired: int = 0
    parked: int = 0
    renewed: int = 0
    migrations: int = 0
    engine_restarts: int = 0
    queued: int = 0
    spilled: int = 0
    failed_over: int = 0
    refused: dict[RefusalReason, int] = field(default_factory=_no_refusals)
    decoder_rules: dict[str, int] = field(default_factory=dict)
    prefill_rules: dict[str, int] = field(default_factory=dict)
    directives: dict[MoveReason, int] = field(default_factory=_no_moves)
    withdrawn: int = 0
    moved: dict[MoveReason, int] = field(default_factory=_no_moves)
    stayed: dict[SupersedeCause, int] = field(default_factory=_no_stays)
    lost_caches: int = 0

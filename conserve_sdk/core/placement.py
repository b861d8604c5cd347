"""Placement: which decoder a new lease gets, and where its first turn is prefilled.

Pure functions of a `Wanted`, the engines' views and the settings. Rules (design section 5, policy study section 7):

Admission: a decoder fits when ``max(leased, scraped) + need`` stays at or under the watermark. The larger of the two
counts, not their sum: a lease shows in both, in the ledger from its grant on, in the scrape once its KV is there.

Decoder: the lowest ``(max(leased, scraped) + need) / capacity``, the load after placement; in a fleet of equal
capacities this is the paper's "most free KV". Ties go to the lower id. Fractions are compared by cross multiplication.

Prefill: see `conserve_sdk.core.prefill`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conserve_sdk.core.events import EngineState, RefusalReason, Role
from conserve_sdk.core.prefill import PrefillPlan, plan_prefill
from conserve_sdk.core.receipt import CandidateView, Receipt
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import MILLION, EngineId, ModelName, Ms, Tokens
from conserve_sdk.core.views import EngineView

FITS = "fits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a request asks of placement.

    Attributes:
        input_tokens: the first turn's input.
        exact: False when `input_tokens` is an estimate. Estimates are never refused for being a little too long:
            the engine will count.
        hint: decoder preferred within the slack.
        failed_engine_id: engine to leave out, in both parts.
        freed_engine_id, freed_tokens: what the lease to be superseded holds now, and will not any more.
        waited_ms: for the receipt.
    """

    model: ModelName
    input_tokens: Tokens
    exact: bool = True
    hint: EngineId | None = None
    failed_engine_id: EngineId | None = None
    freed_engine_id: EngineId | None = None
    freed_tokens: Tokens = Tokens(0)
    waited_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A decoder, and a prefiller unless the first turn is prefilled on the decoder itself.

    Attributes:
        input_tokens: the first turn's input, at most what the decoder can host where it is an estimate.
        need_tokens: what was admitted: the input and the growth reserve.
    """

    decoder: EngineView
    prefiller: EngineView | None
    input_tokens: Tokens
    need_tokens: Tokens
    receipt: Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPlacement:
    """Nothing fits. `hopeless`: waiting does not help, refuse at once."""

    reason: RefusalReason
    detail: str
    hopeless: bool
    need_tokens: Tokens
    verdicts: dict[EngineId, str]


def place(
    wanted: Wanted, engines: Sequence[EngineView], *, settings: BrokerSettings, now_ms: Ms
) -> Placement | NoPlacement:
    """Choose engines for one lease.

    Args:
        wanted: the request.
        engines: the engines configured for its model, ordered by id.
        settings: preset and freshness bound.
        now_ms: to judge the age of observations.
    """
    hosts = [view for view in engines if view.spec.role is not Role.PREFILLER]
    need = _clamped_need(wanted, hosts, settings)
    hopeless = _why_never(wanted, engines, hosts, settings)
    if hopeless is not None:
        return NoPlacement(reason=hopeless[0], detail=hopeless[1], hopeless=True, need_tokens=need, verdicts={})
    verdicts = {view.engine_id: _host_verdict(view, wanted, need, settings, now_ms) for view in hosts}
    fitting = [view for view in hosts if verdicts[view.engine_id] == FITS]
    if not fitting:
        return _nothing_fits(wanted, need, verdicts)
    decoder, rule = _choose_decoder(fitting, wanted, need, settings)
    verdicts[decoder.engine_id] = "chosen"
    input_tokens = Tokens(need - settings.placement.reserve_tokens)
    plan = plan_prefill(
        decoder,
        engines,
        input_tokens=input_tokens,
        failed_engine_id=wanted.failed_engine_id,
        settings=settings,
        now_ms=now_ms,
    )
    receipt = _receipt(wanted, need, hosts, verdicts, rule=rule, plan=plan, settings=settings)
    return Placement(
        decoder=decoder, prefiller=plan.prefiller, input_tokens=input_tokens, need_tokens=need, receipt=receipt
    )


def refusal_receipt(
    wanted: Wanted, refused: NoPlacement, engines: Sequence[EngineView], *, settings: BrokerSettings
) -> Receipt:
    """The receipt of a refusal, made only when one is given."""
    hosts = [view for view in engines if view.engine_id in refused.verdicts]
    return _receipt(
        wanted, refused.need_tokens, hosts, refused.verdicts, rule=refused.reason.value, plan=None, settings=settings
    )


# ---- admission ----------------------------------------------------------------------------------------------


def _limit(view: EngineView, settings: BrokerSettings) -> int:
    """Tokens under the watermark; the largest integer x with ``x * 10^6 <= watermark_ppm * capacity``."""
    return view.kv_capacity_tokens * settings.placement.kv_watermark_ppm // MILLION


def _occupied(view: EngineView, wanted: Wanted) -> int:
    freed = wanted.freed_tokens if view.engine_id == wanted.freed_engine_id else 0
    return max(view.kv_leased_tokens - freed, view.kv_used_tokens - freed, 0)


def _longest(view: EngineView, settings: BrokerSettings) -> int | None:
    """The longest first input this engine could ever host; None while nothing is known of it."""
    if view.kv_capacity_tokens == 0:
        return None
    room = _limit(view, settings) - settings.placement.reserve_tokens
    return min(room, view.max_model_len_tokens) if view.max_model_len_tokens else room


def _longest_of(hosts: Sequence[EngineView], settings: BrokerSettings) -> int | None:
    lengths = [_longest(view, settings) for view in hosts]
    known = [length for length in lengths if length is not None]
    return max(known) if known and len(known) == len(lengths) else None


def _clamped_need(wanted: Wanted, hosts: Sequence[EngineView], settings: BrokerSettings) -> Tokens:
    longest = None if wanted.exact else _longest_of(hosts, settings)
    tokens = wanted.input_tokens if longest is None else min(wanted.input_tokens, max(longest, 0))
    return Tokens(tokens + settings.placement.reserve_tokens)


def _why_never(
    wanted: Wanted, engines: Sequence[EngineView], hosts: Sequence[EngineView], settings: BrokerSettings
) -> tuple[RefusalReason, str] | None:
    if not engines:
        return RefusalReason.UNKNOWN_MODEL, f"no engine is configured for model {wanted.model}: check its name"
    longest = _longest_of(hosts, settings)
    # An estimate may be off by a factor of two; what is longer even then is too long.
    at_least = wanted.input_tokens if wanted.exact else wanted.input_tokens // 2
    if longest is not None and at_least > longest:
        taken = f"the largest decoder of {wanted.model} takes {longest}"
        return RefusalReason.PROMPT_TOO_LONG, f"the first turn has {wanted.input_tokens} tokens, {taken}: shorten it"
    return None


def _host_verdict(view: EngineView, wanted: Wanted, need: int, settings: BrokerSettings, now_ms: Ms) -> str:
    if view.engine_id == wanted.failed_engine_id:
        return "failed"
    if view.state is not EngineState.READY:
        return view.state.value
    if not view.observed_within(settings.observation_max_age_ms, now_ms=now_ms):
        return "stale"
    if view.kv_capacity_tokens == 0:
        return "capacity_unknown"
    if 0 < view.max_model_len_tokens < need - settings.placement.reserve_tokens:
        return "prompt_too_long"
    return FITS if _occupied(view, wanted) + need <= _limit(view, settings) else "over_watermark"


def _nothing_fits(wanted: Wanted, need: Tokens, verdicts: dict[EngineId, str]) -> NoPlacement:
    ready = [verdict for verdict in verdicts.values() if verdict in {"over_watermark", "prompt_too_long"}]
    if ready:
        reason = RefusalReason.NO_CAPACITY
        detail = f"no decoder of {wanted.model} has {need} tokens of KV free under its watermark: retry or add decoders"
    else:
        seen = ", ".join(f"{engine_id} {verdict}" for engine_id, verdict in verdicts.items()) or "none configured"
        reason = RefusalReason.NO_READY_ENGINE
        detail = f"no decoder of {wanted.model} is ready ({seen}): see `conserve engines list`"
    return NoPlacement(reason=reason, detail=detail, hopeless=False, need_tokens=need, verdicts=verdicts)


# ---- decoder ------------------------------------------------------------------------------------------------


def _choose_decoder(
    fitting: Sequence[EngineView], wanted: Wanted, need: int, settings: BrokerSettings
) -> tuple[EngineView, str]:
    best, hinted = fitting[0], None
    for view in fitting:
        if _load_gap(view, best, wanted, need) < 0:
            best = view
        if view.engine_id == wanted.hint:
            hinted = view
    if hinted is not None:
        both = hinted.kv_capacity_tokens * best.kv_capacity_tokens
        if _load_gap(hinted, best, wanted, need) * MILLION <= settings.placement.hint_slack_ppm * both:
            return hinted, "hint"
    return best, "most_free_kv"


def _load_gap(one: EngineView, other: EngineView, wanted: Wanted, need: int) -> int:
    """Load of one minus load of the other, times both capacities."""
    return (_occupied(one, wanted) + need) * other.kv_capacity_tokens - (
        _occupied(other, wanted) + need
    ) * one.kv_capacity_tokens


# ---- receipt ------------------------------------------------------------------------------------------------


def _receipt(
    wanted: Wanted,
    need: Tokens,
    hosts: Sequence[EngineView],
    verdicts: dict[EngineId, str],
    *,
    rule: str,
    plan: PrefillPlan | None,
    settings: BrokerSettings,
) -> Receipt:
    shown = _shortlist(hosts, verdicts, wanted, need, settings.receipt_candidates_max)
    own_score = {} if plan is None else {plan.decoder_id: plan.decoder_score_us}
    candidates = [
        _candidate(view, "decoder", verdicts[view.engine_id], own_score.get(view.engine_id, -1)) for view in shown
    ]
    if plan is not None:
        candidates += [
            _candidate(weighed.view, "prefiller", weighed.verdict, weighed.score_us)
            for weighed in plan.shortlist(settings.receipt_candidates_max)
        ]
    return Receipt(
        preset=settings.placement.name,
        rule=rule,
        prefill_rule="" if plan is None else plan.rule,
        need_tokens=need,
        waited_ms=wanted.waited_ms,
        candidates=tuple(candidates),
    )


def _shortlist(
    hosts: Sequence[EngineView], verdicts: dict[EngineId, str], wanted: Wanted, need: int, entries_max: int
) -> Sequence[EngineView]:
    if len(hosts) <= entries_max:
        return hosts

    def rank(view: EngineView) -> tuple[int, int, EngineId]:
        verdict = verdicts[view.engine_id]
        order = 0 if verdict == "chosen" else 1 if verdict == FITS else 2
        load_ppm = (_occupied(view, wanted) + need) * MILLION // max(view.kv_capacity_tokens, 1)
        return order, load_ppm, view.engine_id

    return sorted(sorted(hosts, key=rank)[:entries_max], key=lambda view: view.engine_id)


def _candidate(view: EngineView, role: str, verdict: str, score_us: int) -> CandidateView:
    return CandidateView(
        engine_id=view.engine_id,
        role=role,
        verdict=verdict,
        capacity_tokens=view.kv_capacity_tokens,
        leased_tokens=view.kv_leased_tokens,
        used_tokens=view.kv_used_tokens,
        backlog_tokens=view.backlog_tokens,
        running=view.running,
        rate_tokens_per_s=view.rate_tokens_per_s,
        score_us=score_us,
    )

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
from conserve_sdk.core.receipt import Receipt
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import MILLION, EngineId, ModelName, Ms, Tokens
from conserve_sdk.core.views import EngineView


@dataclass(slots=True, kw_only=True)
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


@dataclass(slots=True)
class Host:
    """A decoder while it is weighed.

    Attributes:
        occupied_tokens: KV that counts against it before this lease.
        limit_tokens: KV under the watermark: the largest integer x with ``x * 10^6 <= watermark * capacity``.
        verdict: see `CandidateView`.
    """

    view: EngineView
    occupied_tokens: int
    limit_tokens: int
    verdict: str = ""


@dataclass(slots=True, kw_only=True)
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


@dataclass(slots=True, kw_only=True)
class NoPlacement:
    """Nothing fits. `hopeless`: waiting does not help, refuse at once."""

    reason: RefusalReason
    detail: str
    hopeless: bool
    need_tokens: Tokens
    hosts: tuple[Host, ...] = ()


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
    hosts = _hosts(wanted, engines, settings)
    longest = None if wanted.exact else _longest_first_input(hosts, settings)
    if not engines or _too_long(wanted, longest):
        return _never(wanted, longest)
    input_tokens = wanted.input_tokens if longest is None else Tokens(min(wanted.input_tokens, longest))
    need = Tokens(input_tokens + settings.placement.reserve_tokens)
    for host in hosts:
        host.verdict = _verdict(host, wanted, need, settings, now_ms)
    fitting = [host for host in hosts if host.verdict == "fits"]
    if not fitting:
        return _nothing_fits(wanted, need, hosts, settings)
    chosen, rule = _choose_decoder(fitting, wanted.hint, need, settings)
    chosen.verdict = "chosen"
    plan = plan_prefill(
        chosen.view,
        engines,
        input_tokens=input_tokens,
        failed_engine_id=wanted.failed_engine_id,
        settings=settings,
        now_ms=now_ms,
    )
    receipt = _receipt(wanted, need, hosts, rule=rule, plan=plan, settings=settings)
    return Placement(
        decoder=chosen.view, prefiller=plan.prefiller, input_tokens=input_tokens, need_tokens=need, receipt=receipt
    )


def refusal_receipt(wanted: Wanted, refused: NoPlacement, *, settings: BrokerSettings) -> Receipt:
    """The receipt of a refusal, made only when one is given."""
    return _receipt(wanted, refused.need_tokens, refused.hosts, rule=refused.reason.value, plan=None, settings=settings)


# ---- admission ----------------------------------------------------------------------------------------------


def _hosts(wanted: Wanted, engines: Sequence[EngineView], settings: BrokerSettings) -> list[Host]:
    watermark_ppm = settings.placement.kv_watermark_ppm
    hosts = []
    for view in engines:
        if view.spec.role is not Role.PREFILLER:
            occupied: int = max(view.kv_leased_tokens, view.kv_used_tokens)
            if wanted.freed_tokens and view.spec.engine_id == wanted.freed_engine_id:
                occupied = max(occupied - wanted.freed_tokens, 0)
            hosts.append(Host(view, occupied, view.kv_capacity_tokens * watermark_ppm // MILLION))
    return hosts


def _verdict(host: Host, wanted: Wanted, need: int, settings: BrokerSettings, now_ms: Ms) -> str:
    view = host.view
    if view.spec.engine_id == wanted.failed_engine_id:
        return "failed"
    if view.state is not EngineState.READY:
        return view.state.value
    if not view.observed_within(settings.observation_max_age_ms, now_ms=now_ms):
        return "stale"
    if view.kv_capacity_tokens == 0:
        return "capacity_unknown"
    if 0 < view.max_model_len_tokens < need - settings.placement.reserve_tokens:
        return "prompt_too_long"
    return "fits" if host.occupied_tokens + need <= host.limit_tokens else "over_watermark"


def _longest_first_input(hosts: Sequence[Host], settings: BrokerSettings) -> int | None:
    """The longest first input that any of them could host when empty; None while one of them is not known."""
    longest = -1
    for host in hosts:
        if host.view.kv_capacity_tokens == 0:
            return None
        room = max(host.limit_tokens - settings.placement.reserve_tokens, 0)
        longest = max(longest, min(room, host.view.max_model_len_tokens or room))
    return longest if hosts else None


def _too_long(wanted: Wanted, longest: int | None) -> bool:
    # An estimate may be off by a factor of two; what is longer even then is too long.
    at_least = wanted.input_tokens if wanted.exact else wanted.input_tokens // 2
    return longest is not None and at_least > longest


def _never(wanted: Wanted, longest: int | None) -> NoPlacement:
    if longest is None:
        reason = RefusalReason.UNKNOWN_MODEL
        detail = f"no engine is configured for model {wanted.model}: check its name"
    else:
        reason = RefusalReason.PROMPT_TOO_LONG
        taken = f"the largest decoder of {wanted.model} takes {longest}"
        detail = f"the first turn has {wanted.input_tokens} tokens, {taken}: shorten it"
    return NoPlacement(reason=reason, detail=detail, hopeless=True, need_tokens=wanted.input_tokens)


def _nothing_fits(wanted: Wanted, need: Tokens, hosts: Sequence[Host], settings: BrokerSettings) -> NoPlacement:
    longest = _longest_first_input(hosts, settings)
    if _too_long(wanted, longest):
        return _never(wanted, longest)
    if any(host.verdict in {"over_watermark", "prompt_too_long"} for host in hosts):
        reason = RefusalReason.NO_CAPACITY
        detail = f"no decoder of {wanted.model} has {need} tokens of KV free under its watermark: retry or add decoders"
    else:
        seen = ", ".join(f"{host.view.engine_id} {host.verdict}" for host in hosts) or "none configured"
        reason = RefusalReason.NO_READY_ENGINE
        detail = f"no decoder of {wanted.model} is ready ({seen}): see `conserve engines list`"
    return NoPlacement(reason=reason, detail=detail, hopeless=False, need_tokens=need, hosts=tuple(hosts))


# ---- decoder ------------------------------------------------------------------------------------------------


def _choose_decoder(
    fitting: Sequence[Host], hint: EngineId | None, need: int, settings: BrokerSettings
) -> tuple[Host, str]:
    best, hinted = fitting[0], None
    for host in fitting:
        if _load_gap(host, best, need) < 0:
            best = host
        if host.view.spec.engine_id == hint:
            hinted = host
    if hinted is not None:
        both = hinted.view.kv_capacity_tokens * best.view.kv_capacity_tokens
        if _load_gap(hinted, best, need) * MILLION <= settings.placement.hint_slack_ppm * both:
            return hinted, "hint"
    return best, "most_free_kv"


def _load_gap(one: Host, other: Host, need: int) -> int:
    """Load of one minus load of the other, after placement, times both capacities."""
    one_load = (one.occupied_tokens + need) * other.view.kv_capacity_tokens
    return one_load - (other.occupied_tokens + need) * one.view.kv_capacity_tokens


# ---- receipt ------------------------------------------------------------------------------------------------


def _receipt(
    wanted: Wanted,
    need: Tokens,
    hosts: Sequence[Host],
    *,
    rule: str,
    plan: PrefillPlan | None,
    settings: BrokerSettings,
) -> Receipt:
    entries_max = settings.receipt_candidates_max
    own_score_us = -1 if plan is None else plan.decoder_score_us
    candidates = [
        host.view.as_candidate("decoder", host.verdict, own_score_us if host.verdict == "chosen" else -1)
        for host in _shortlist(hosts, entries_max)
    ]
    if plan is not None:
        candidates += [
            weighed.view.as_candidate("prefiller", weighed.verdict, weighed.score_us)
            for weighed in plan.shortlist(entries_max)
        ]
    return Receipt(
        preset=settings.placement.name,
        rule=rule,
        prefill_rule="" if plan is None else plan.rule,
        need_tokens=need,
        waited_ms=wanted.waited_ms,
        candidates=tuple(candidates),
    )


def _shortlist(hosts: Sequence[Host], entries_max: int) -> Sequence[Host]:
    """The decoders a receipt shows: the chosen one and the emptiest others, ordered by id."""
    if len(hosts) <= entries_max:
        return hosts

    def rank(host: Host) -> tuple[int, int, EngineId]:
        order = 0 if host.verdict == "chosen" else 1 if host.verdict == "fits" else 2
        load_ppm = host.occupied_tokens * MILLION // max(host.view.kv_capacity_tokens, 1)
        return order, load_ppm, host.view.spec.engine_id

    return sorted(sorted(hosts, key=rank)[:entries_max], key=lambda host: host.view.spec.engine_id)

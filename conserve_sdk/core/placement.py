"""Placement: which decoder a new lease gets, and where its first turn is prefilled.

Pure functions of a `Wanted`, the engines' views and the settings. Rules (design section 5, policy study section 7):

Hosts and their loads: see `conserve_sdk.core.hosting`. Decoder: the fitting host of the lowest load after placement,
unless one that is hinted (the parent lease's decoder, then the lineage's previous one) is at most the slack above it.
Ties go to the lower id. Prefill: see `conserve_sdk.core.prefill`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from conserve_sdk.core.hosting import Host, gap_exceeds, hosts_of, judge, lowest_load
from conserve_sdk.core.prefill import plan_prefill
from conserve_sdk.core.receipt import Receipt
from conserve_sdk.core.receipts import receipt_of
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import EngineId, ModelName, Ms, Ppm, Tokens
from conserve_sdk.core.views import EngineView
from conserve_sdk.core.vocabulary import RefusalReason

LOST_SHARE_MAX_PPM = Ppm(500_000)
"""A hinted engine that lost the KV of at least this share of recent follow-up turns is a hint no longer."""

_FULL = frozenset({"over_watermark", "oversubscribed", "prompt_too_long"})


@dataclass(slots=True, kw_only=True)
class Wanted:
    """What a request asks of placement.

    Attributes:
        input_tokens: the first turn's input.
        exact: False when `input_tokens` is an estimate. Estimates are never refused for being a little too long:
            the engine will count.
        parent, hint: decoders preferred within the slack, in this order.
        quota_tokens, tenant_tokens: what the tenant's leases may hold together (0: no bound), and what the others do.
        cached: tokens of the prompt that each engine is known to hold (a shared preamble).
        failed_engine_id: engine to leave out, in both parts.
        freed_engine_id, freed_tokens: what the lease to be superseded holds now, and will not any more.
        waited_ms: for the receipt.
    """

    model: ModelName
    input_tokens: Tokens
    exact: bool = True
    parent: EngineId | None = None
    hint: EngineId | None = None
    quota_tokens: Tokens = Tokens(0)
    tenant_tokens: Tokens = Tokens(0)
    cached: Mapping[EngineId, Tokens] = field(default_factory=dict)
    failed_engine_id: EngineId | None = None
    freed_engine_id: EngineId | None = None
    freed_tokens: Tokens = Tokens(0)
    waited_ms: int = 0


@dataclass(slots=True, kw_only=True)
class Placement:
    """A decoder, and a prefiller unless the first turn is prefilled on the decoder itself.

    Attributes:
        input_tokens: the first turn's input, at most what the decoder can host where it is an estimate.
        uncached_tokens: the part of it that has to be prefilled where it is prefilled.
        need_tokens: what was admitted: the input and the growth reserve.
    """

    decoder: EngineView
    prefiller: EngineView | None
    input_tokens: Tokens
    uncached_tokens: Tokens
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
    hosts = hosts_of(
        engines, freed_engine_id=wanted.freed_engine_id, freed_tokens=wanted.freed_tokens, rules=settings.placement
    )
    longest = None if wanted.exact else _longest_first_input(hosts, settings)
    if not engines or _too_long(wanted, longest):
        return _never(wanted, longest)
    input_tokens = wanted.input_tokens if longest is None else Tokens(min(wanted.input_tokens, longest))
    need = Tokens(input_tokens + settings.placement.reserve_tokens)
    if wanted.quota_tokens and wanted.tenant_tokens + need > wanted.quota_tokens:
        return _over_quota(wanted, need)
    fitting = judge(hosts, need_tokens=need, failed_engine_id=wanted.failed_engine_id, settings=settings, now_ms=now_ms)
    if not fitting:
        return _nothing_fits(wanted, need, hosts, settings)
    chosen, rule = _choose_decoder(fitting, wanted, need, settings)
    chosen.verdict = "chosen"
    plan = plan_prefill(
        chosen.view,
        engines,
        input_tokens=input_tokens,
        cached=wanted.cached,
        failed_engine_id=wanted.failed_engine_id,
        settings=settings,
        now_ms=now_ms,
    )
    return Placement(
        decoder=chosen.view,
        prefiller=plan.prefiller,
        input_tokens=input_tokens,
        uncached_tokens=plan.uncached_tokens,
        need_tokens=need,
        receipt=receipt_of(settings, rule=rule, need_tokens=need, waited_ms=wanted.waited_ms, hosts=hosts, plan=plan),
    )


def refusal_receipt(wanted: Wanted, refused: NoPlacement, *, settings: BrokerSettings) -> Receipt:
    """The receipt of a refusal, made only when one is given."""
    return receipt_of(
        settings,
        rule=refused.reason.value,
        need_tokens=refused.need_tokens,
        waited_ms=wanted.waited_ms,
        hosts=refused.hosts,
        plan=None,
    )


# ---- admission ----------------------------------------------------------------------------------------------


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


def _over_quota(wanted: Wanted, need: Tokens) -> NoPlacement:
    hopeless = need > wanted.quota_tokens
    remedy = "shorten it, or raise the quota" if hopeless else "release leases of the tenant, or retry"
    return NoPlacement(
        reason=RefusalReason.OVER_QUOTA,
        detail=f"the lease needs {need} tokens, and the tenant's other leases hold {wanted.tenant_tokens} of its quota "
        f"of {wanted.quota_tokens} (leased_tokens_per_tenant_max): {remedy}",
        hopeless=hopeless,
        need_tokens=need,
    )


def _nothing_fits(wanted: Wanted, need: Tokens, hosts: Sequence[Host], settings: BrokerSettings) -> NoPlacement:
    longest = _longest_first_input(hosts, settings)
    if _too_long(wanted, longest):
        return _never(wanted, longest)
    if any(host.verdict in _FULL for host in hosts):
        reason = RefusalReason.NO_CAPACITY
        detail = f"no decoder of {wanted.model} has {need} tokens of KV free under its watermark: retry or add decoders"
    else:
        seen = ", ".join(f"{host.view.engine_id} {host.verdict}" for host in hosts) or "none configured"
        reason = RefusalReason.NO_READY_ENGINE
        detail = f"no decoder of {wanted.model} is ready ({seen}): see `conserve engines list`"
    return NoPlacement(reason=reason, detail=detail, hopeless=False, need_tokens=need, hosts=tuple(hosts))


# ---- decoder ------------------------------------------------------------------------------------------------


def _choose_decoder(fitting: Sequence[Host], wanted: Wanted, need: int, settings: BrokerSettings) -> tuple[Host, str]:
    best = lowest_load(fitting, need_tokens=need)
    for rule, engine_id in (("parent", wanted.parent), ("hint", wanted.hint)):
        if engine_id is None:
            continue
        for host in fitting:
            # An engine that loses what it was left with has nothing for whoever comes back to it.
            if host.view.engine_id == engine_id and host.view.lost_share_ppm < LOST_SHARE_MAX_PPM:
                slack_ppm = settings.placement.hint_slack_ppm
                if gap_exceeds(host, best, need_tokens=need, than_ppm=slack_ppm):
                    continue
                return host, rule
    return best, "most_free_kv"

"""Which engines can host a lease, and how loaded they are (the rule of docs/placement.md).

A host fits when both hold, with x the tokens to be admitted::

    active + x <= OVER * capacity          active = max(active leases' ledgers, scraped usage)
    leased + x <= HOVER * capacity         only with a host tier, and never more than capacity + host tier

Without a host tier every lease is active. The larger of ledger and scrape counts, not their sum: a lease shows in
both, in the ledger from its grant on, in the scrape once its KV is there. On a prefiller what was dispatched to it and
not yet prefilled is active too, its prefill share must be at most GATE, and OVER is less by PRES, kept free for
prompts on their way.

    load = (active + x) / capacity + w * (leased + x) / capacity (+ H0 + BETA * prefill share on a prefiller)

In a fleet of equal decoders without host tiers this is the paper's "most free KV". Fractions are compared by cross
multiplication, so that a boundary is a boundary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from conserve_sdk.core.events import EngineState, Role
from conserve_sdk.core.settings import BrokerSettings, PlacementSettings, PrefillerHosts
from conserve_sdk.core.units import MILLION, EngineId, Ms
from conserve_sdk.core.views import EngineView


@dataclass(slots=True)
class Host:
    """An engine while it is weighed as host.

    Attributes:
        active_tokens, leased_tokens: KV that counts against it before this lease.
        limit_tokens: most active KV under the watermark: the largest integer x with ``x * 10^6 <= OVER * capacity``.
        leased_limit_tokens: most leased KV.
        used_ppm: active KV over capacity.
        constant_ppm: load that does not come from KV.
        gated: whether it is a prefiller that prefills too much to host.
        rules: by which it was weighed.
        verdict: see `CandidateView`.
    """

    view: EngineView
    active_tokens: int
    leased_tokens: int
    limit_tokens: int
    leased_limit_tokens: int
    rules: PlacementSettings
    used_ppm: int = 0
    constant_ppm: int = 0
    gated: bool = False
    verdict: str = ""

    def load(self, need_tokens: int) -> int:
        """Load with so many tokens more, times capacity times 10^6."""
        weight_ppm = self.rules.leased_weight_ppm
        kv_load = (self.active_tokens + need_tokens) * MILLION + weight_ppm * (self.leased_tokens + need_tokens)
        return kv_load + self.constant_ppm * self.view.kv_capacity_tokens


def hosts_of(
    engines: Iterable[EngineView],
    *,
    freed_engine_id: EngineId | None = None,
    freed_tokens: int = 0,
    rules: PlacementSettings,
) -> list[Host]:
    """The engines that may ever host, in their order; on one of them a lease that is to be replaced frees tokens."""
    prefillers_too = rules.prefiller_hosts is PrefillerHosts.AUTO
    hosts = []
    for view in engines:
        spec = view.spec
        if prefillers_too or spec.role is not Role.PREFILLER:
            freed = freed_tokens if spec.engine_id == freed_engine_id else 0
            hosts.append(_weighed(view, rules, freed) if freed else host_of(view, rules))
    return hosts


def host_verdict(
    host: Host, *, need_tokens: int, failed_engine_id: EngineId | None, settings: BrokerSettings, now_ms: Ms
) -> str:
    """``"fits"``, or why the engine cannot take so many tokens now."""
    view = host.view
    if failed_engine_id is not None and view.spec.engine_id == failed_engine_id:
        return "failed"
    if view.state is not EngineState.READY:
        return view.state.value
    if not view.observed_within(settings.observation_max_age_ms, now_ms=now_ms):
        return "stale"
    return _room_verdict(host, need_tokens, settings)


def _room_verdict(host: Host, need_tokens: int, settings: BrokerSettings) -> str:
    view = host.view
    if view.kv_capacity_tokens == 0:
        return "capacity_unknown"
    if 0 < view.max_model_len_tokens < need_tokens - settings.placement.reserve_tokens:
        return "prompt_too_long"
    if host.gated:
        return "prefilling"
    if host.active_tokens + need_tokens > host.limit_tokens:
        return "over_watermark"
    return "fits" if host.leased_tokens + need_tokens <= host.leased_limit_tokens else "oversubscribed"


def lowest_load(fitting: Sequence[Host], *, need_tokens: int) -> Host:
    """The host of the lowest load after placement; the first of those."""
    best = fitting[0]
    best_load, best_capacity = best.load(need_tokens), best.view.kv_capacity_tokens
    for host in fitting:
        load, capacity = host.load(need_tokens), host.view.kv_capacity_tokens
        if load * best_capacity < best_load * capacity:
            best, best_load, best_capacity = host, load, capacity
    return best


def gap_exceeds(one: Host, other: Host, *, need_tokens: int = 0, than_ppm: int) -> bool:
    """Whether the load of one is more than so much above the load of the other."""
    one_capacity, other_capacity = one.view.kv_capacity_tokens, other.view.kv_capacity_tokens
    gap = one.load(need_tokens) * other_capacity - other.load(need_tokens) * one_capacity
    return gap > than_ppm * one_capacity * other_capacity


def host_of(view: EngineView, rules: PlacementSettings) -> Host:
    """One engine as a host. Weighed once per view: of a large fleet, one grant changes two engines."""
    host: Host | None = view.derived.get(Host)
    if host is None or host.rules is not rules:
        host = view.derived[Host] = _weighed(view, rules, 0)
    host.verdict = ""  # of an earlier decision
    return host


def _weighed(view: EngineView, rules: PlacementSettings, freed_tokens: int) -> Host:
    """One engine as a host, without so many tokens of a lease that is to be replaced."""
    capacity = view.kv_capacity_tokens
    limit = leased_limit = capacity * rules.kv_watermark_ppm // MILLION
    active: int = max(view.kv_active_tokens, view.kv_used_tokens)
    leased: int = max(view.kv_leased_tokens, view.kv_used_tokens)
    constant, gated = 0, False
    if view.spec.role is Role.PREFILLER:
        active = max(view.kv_active_tokens + view.backlog_tokens, view.kv_used_tokens)
        constant = rules.host_base_load_ppm + rules.host_share_weight_ppm * view.prefill_share_ppm // MILLION
        gated = view.prefill_share_ppm > rules.host_gate_ppm
        limit = leased_limit = capacity * max(rules.kv_watermark_ppm - rules.host_reserve_ppm, 0) // MILLION
    if rules.idle_aware and view.spec.host_tier_tokens:
        leased_limit = min(capacity * rules.oversubscription_ppm // MILLION, capacity + view.spec.host_tier_tokens)
    if freed_tokens:
        active, leased = max(active - freed_tokens, 0), max(leased - freed_tokens, 0)
    return Host(
        view,
        active,
        leased,
        limit,
        leased_limit,
        rules,
        used_ppm=active * MILLION // max(capacity, 1),
        constant_ppm=constant,
        gated=gated,
    )

"""Which engines can host a lease, and how loaded they are (the rule of docs/placement.md).

A host fits when both hold, with x the tokens to be admitted::

    active + x <= OVER * capacity          active = max(active leases' ledgers, scraped usage)
    leased + x <= HOVER * capacity         only with a host tier, and never more than capacity + host tier

Without a host tier every lease is active. The larger of ledger and scrape counts, not their sum: a lease shows in
both, in the ledger from its grant on, in the scrape once its KV is there. On a prefiller what was dispatched to it and
not yet prefilled is active too, its prefill share must be at most GATE, and OVER is less by PRES, kept free for
prompts on their way.

    load = (active + x) / capacity + w * (leased + x) / capacity + BETA * prefill share (+ H0 on a prefiller)

BETA counts only where prefillers may host, but then on every engine: prefill work is load wherever it is done; counted
on prefillers alone it kept them empty where all engines prefill alike. In a fleet of equal decoders without host tiers,
where no prefiller hosts, this is the paper's "most free KV". Fractions are compared by cross multiplication, so that a
boundary is a boundary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from conserve_sdk.core.settings import BrokerSettings, PlacementSettings, PrefillerHosts
from conserve_sdk.core.units import MILLION, EngineId, Ms
from conserve_sdk.core.views import EngineView
from conserve_sdk.core.vocabulary import EngineState, Role


@dataclass(slots=True)
class Host:
    """An engine while it is weighed as host.

    Attributes:
        active_tokens, leased_tokens: KV that counts against it before this lease.
        limit_tokens: most active KV under the watermark: the largest integer x with ``x * 10^6 <= OVER * capacity``.
        leased_limit_tokens: most leased KV.
        room_tokens: the largest lease it could take if it is seen often enough; below 0: none at all.
        base_load, token_load: load without this lease, and of each of its tokens; times capacity times 10^6.
        used_ppm: active KV over capacity.
        gated: whether it is a prefiller that prefills too much to host.
        level: whether no lease moves away because of its load: no load is below 0, so no gap is that wide.
        rules: by which it was weighed.
        verdict: see `CandidateView`.
    """

    view: EngineView
    active_tokens: int
    leased_tokens: int
    limit_tokens: int
    leased_limit_tokens: int
    room_tokens: int
    base_load: int
    token_load: int
    used_ppm: int
    gated: bool
    level: bool
    rules: PlacementSettings
    verdict: str = ""

    def load(self, need_tokens: int) -> int:
        """Load with so many tokens more, times capacity times 10^6."""
        return self.base_load + self.token_load * need_tokens


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
            if freed_tokens and spec.engine_id == freed_engine_id:
                hosts.append(_weighed(view, rules, freed_tokens))
            else:
                hosts.append(host_of(view, rules))
    return hosts


def judge(
    hosts: Iterable[Host], *, need_tokens: int, failed_engine_id: EngineId | None, settings: BrokerSettings, now_ms: Ms
) -> list[Host]:
    """Give every host its verdict on so many tokens, and return those that can take them now."""
    seen_since_ms = now_ms - settings.observation_max_age_ms
    fitting = []
    for host in hosts:
        view = host.view
        # Of a large fleet most fit, and what else could be against them was looked at when they were weighed.
        fresh = view.observed_at_ms is not None and view.observed_at_ms >= seen_since_ms
        if fresh and need_tokens <= host.room_tokens and view.spec.engine_id != failed_engine_id:
            host.verdict = "fits"
            fitting.append(host)
        elif view.spec.engine_id == failed_engine_id:
            host.verdict = "failed"
        else:
            host.verdict = _why_not(host, need_tokens, settings, fresh=fresh)
    return fitting


def _why_not(host: Host, need_tokens: int, settings: BrokerSettings, *, fresh: bool) -> str:
    view = host.view
    if view.state is not EngineState.READY:
        return view.state.value
    if not fresh:
        return "stale"
    if view.kv_capacity_tokens == 0:
        return "capacity_unknown"
    if 0 < view.max_model_len_tokens < need_tokens - settings.placement.reserve_tokens:
        return "prompt_too_long"
    if host.gated:
        return "prefilling"
    return "over_watermark" if host.active_tokens + need_tokens > host.limit_tokens else "oversubscribed"


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
    return host


def _weighed(view: EngineView, rules: PlacementSettings, freed_tokens: int) -> Host:
    """One engine as a host, without so many tokens of a lease that is to be replaced."""
    capacity = view.kv_capacity_tokens
    limit = leased_limit = capacity * rules.kv_watermark_ppm // MILLION
    active: int = max(view.kv_active_tokens, view.kv_used_tokens)
    leased: int = max(view.kv_leased_tokens, view.kv_used_tokens)
    constant, gated = 0, False
    if rules.prefiller_hosts is PrefillerHosts.AUTO:
        constant = rules.host_share_weight_ppm * view.prefill_share_ppm // MILLION
    if view.spec.role is Role.PREFILLER:
        active = max(view.kv_active_tokens + view.backlog_tokens, view.kv_used_tokens)
        constant += rules.host_base_load_ppm
        gated = view.prefill_share_ppm > rules.host_gate_ppm
        limit = leased_limit = capacity * max(rules.kv_watermark_ppm - rules.host_reserve_ppm, 0) // MILLION
    if rules.idle_aware and view.spec.host_tier_tokens:
        leased_limit = min(capacity * rules.oversubscription_ppm // MILLION, capacity + view.spec.host_tier_tokens)
    if freed_tokens:
        active, leased = max(active - freed_tokens, 0), max(leased - freed_tokens, 0)
    room = -1
    if view.state is EngineState.READY and capacity and not gated:
        room = min(limit - active, leased_limit - leased)
        if view.max_model_len_tokens:
            room = min(room, view.max_model_len_tokens + rules.reserve_tokens)
    base_load = active * MILLION + rules.leased_weight_ppm * leased + constant * capacity
    return Host(
        view,
        active,
        leased,
        limit,
        leased_limit,
        room,
        base_load=base_load,
        token_load=MILLION + rules.leased_weight_ppm,
        used_ppm=active * MILLION // max(capacity, 1),
        gated=gated,
        level=not gated and base_load <= rules.move_threshold_ppm * capacity,
        rules=rules,
    )

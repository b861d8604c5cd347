"""Switches and constants of the core. Same constants for every workload; the presets differ in switches only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from conserve_sdk.core.units import Ms, Ppm, TenantId, Tokens


class PrefillChoice(StrEnum):
    """Which rule picks the engine that prefills a first turn."""

    ALWAYS_PREFILLER = "always_prefiller"
    """The paper's rule: the least loaded prefiller, whatever its queue."""
    SCORE = "score"
    """The lowest of backlog + own work + move time + harm to running decodes (policy study, section 7)."""
    NEVER = "never"
    """No prefillers: plain affinity with admission."""


class PrefillerHosts(StrEnum):
    """Whether engines of role prefiller may host leases."""

    AUTO = "auto"
    """While their observed share of time with prefill work is low, up to a reserve."""
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """One preset of placement. Letters in brackets are the constants' names in the rule (docs/placement.md).

    Attributes:
        kv_watermark_ppm: admission keeps leased (and observed) KV at or under this share of capacity (OVER = .89).
        hint_slack_ppm: a hinted decoder wins while its load is at most this much above the best (MOVE = .3).
        local_below_tokens: prompts that bring fewer new tokens are prefilled on the decoder (MIN = 2048).
        harm_weight_ppm: W, weight of own prefill time per stream decoding on the engine (.3).
        transfer_overhead_us: fixed cost of a KV move (TX = 20 ms).
        transfer_tokens_per_s: KV link speed in tokens (LINK = 25 GB/s over the model's bytes per token).
        default_rate_tokens_per_s: prefill rate assumed until one was observed.
        reserve_tokens: growth reserve added to every need (default 0).
        idle_aware: on decoders with a host KV tier, leases idle for `idle_after_ms` count only as leased.
        idle_after_ms: from this age of a gap on, a lease is not active (TAU = 1 s).
        oversubscription_ppm: leased KV of a decoder with a host tier, over its capacity, at most (HOVER = 3).
        leased_weight_ppm: weight of leased KV beside active KV in a decoder's load (.25).
        prefiller_hosts: whether prefillers may host leases.
        host_gate_ppm: a prefiller hosts while its prefill share is at most this (GATE = .7).
        host_reserve_ppm: share of a prefiller's KV that leases leave free (PRES = .15).
        host_base_load_ppm: added to the load of a prefiller that hosts (H0 = 0).
        host_share_weight_ppm: where prefillers may host, added to every engine's load per prefill share (BETA = .3).
        prefill_share_window_ms: memory of the prefill share (20 s).
        move_appends: large appends may be prefilled on a prefiller.
        extra_work_ppm: a prefiller may compute at most this share more tokens than the decoder would (EXTRA = .5).
        re_lease: leases may move to another decoder in a gap.
        move_threshold_ppm: difference of loads above which they do (MOVE = .3).
        move_release_ppm: difference at or under which a standing directive is withdrawn (half of MOVE).
        move_idle_ms: a gap must be longer than this for a move because of load (50 ms).
        move_rest_ms: a lease younger than this is not moved because of load.
    """

    name: str
    prefill_choice: PrefillChoice
    kv_watermark_ppm: Ppm = Ppm(890_000)
    hint_slack_ppm: Ppm = Ppm(300_000)
    local_below_tokens: Tokens = Tokens(0)
    harm_weight_ppm: Ppm = Ppm(0)
    transfer_overhead_us: int = 20_000
    transfer_tokens_per_s: int = 200_000
    default_rate_tokens_per_s: int = 10_000
    reserve_tokens: Tokens = Tokens(0)
    idle_aware: bool = False
    idle_after_ms: Ms = Ms(1_000)
    oversubscription_ppm: Ppm = Ppm(3_000_000)
    leased_weight_ppm: Ppm = Ppm(0)
    prefiller_hosts: PrefillerHosts = PrefillerHosts.NEVER
    host_gate_ppm: Ppm = Ppm(700_000)
    host_reserve_ppm: Ppm = Ppm(150_000)
    host_base_load_ppm: Ppm = Ppm(0)
    host_share_weight_ppm: Ppm = Ppm(300_000)
    prefill_share_window_ms: Ms = Ms(20_000)
    move_appends: bool = False
    extra_work_ppm: Ppm = Ppm(500_000)
    re_lease: bool = False
    move_threshold_ppm: Ppm = Ppm(300_000)
    move_release_ppm: Ppm = Ppm(150_000)
    move_idle_ms: Ms = Ms(50)
    move_rest_ms: Ms = Ms(5_000)


PAPER = PlacementSettings(
    name="paper", prefill_choice=PrefillChoice.ALWAYS_PREFILLER, kv_watermark_ppm=Ppm(1_000_000), hint_slack_ppm=Ppm(0)
)
DEFAULT = PlacementSettings(
    name="default",
    prefill_choice=PrefillChoice.SCORE,
    local_below_tokens=Tokens(2_048),
    harm_weight_ppm=Ppm(300_000),
    idle_aware=True,
    leased_weight_ppm=Ppm(250_000),
    prefiller_hosts=PrefillerHosts.AUTO,
    move_appends=True,
    re_lease=True,
)
AFFINITY = PlacementSettings(
    name="affinity",
    prefill_choice=PrefillChoice.NEVER,
    idle_aware=True,
    leased_weight_ppm=Ppm(250_000),
    re_lease=True,
)

PRESETS: dict[str, PlacementSettings] = {preset.name: preset for preset in (PAPER, DEFAULT, AFFINITY)}
"""Presets by the name that configuration and receipts use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantQuota:
    """What one tenant may hold.

    Attributes:
        leases_max: live leases at once.
        leased_tokens_max: tokens that its live leases may hold together; 0: no bound.
    """

    leases_max: int
    leased_tokens_max: Tokens = Tokens(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSettings:
    """Everything `core.Broker` is told at its construction.

    Attributes:
        ttl_ms: life of a lease without a sign of life; clients renew at a third of it.
        park_ttl_ms: life left to a parked lease.
        hold_ms: longest time a decoder is asked to keep a finished turn's blocks; bounded by the engine's own
            `max_hold_ms`; 0 switches holding off.
        hold_share_ppm: share of a decoder's KV capacity that holding leases may fill.
        suspect_after_ms, gone_after_ms: age of the last successful scrape at which an engine stops getting leases,
            and at which its leases are dropped.
        observation_max_age_ms: an engine whose last observation is older gets no new lease (invariant 6).
        leases_max, queue_max, leases_per_tenant_max: bounds (invariant 9).
        leased_tokens_per_tenant_max: tokens that all live leases of one tenant may hold together; 0: no bound.
        tenant_quotas: tenants with bounds of their own in place of these two.
        wait_max_ms: longest time a request may wait for admission.
        retry_after_ms: what a refused client is told at least.
        backlog_max_age_ms: a dispatched prefill nobody reported on stops counting after this long.
        receipt_candidates_max: engines a receipt lists per role (the chosen one always); bounds memory per lease.
    """

    placement: PlacementSettings = field(default_factory=lambda: DEFAULT)
    ttl_ms: Ms = Ms(60_000)
    park_ttl_ms: Ms = Ms(10_000)
    hold_ms: Ms = Ms(10_000)
    hold_share_ppm: Ppm = Ppm(500_000)
    suspect_after_ms: Ms = Ms(3_000)
    gone_after_ms: Ms = Ms(15_000)
    observation_max_age_ms: Ms = Ms(10_000)
    leases_max: int = 100_000
    leases_per_tenant_max: int = 100_000
    leased_tokens_per_tenant_max: Tokens = Tokens(0)
    tenant_quotas: Mapping[TenantId, TenantQuota] = field(default_factory=dict)
    queue_max: int = 10_000
    wait_max_ms: Ms = Ms(120_000)
    retry_after_ms: Ms = Ms(1_000)
    backlog_max_age_ms: Ms = Ms(30_000)
    receipt_candidates_max: int = 4

    def quota_of(self, tenant: TenantId) -> TenantQuota:
        """The bounds of a tenant."""
        common = TenantQuota(leases_max=self.leases_per_tenant_max, leased_tokens_max=self.leased_tokens_per_tenant_max)
        return self.tenant_quotas.get(tenant, common)

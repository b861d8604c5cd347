"""Who can host a lease: idle leases on a host tier, prefillers with time to spare, quotas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conserve_sdk.core import (
    AFFINITY,
    DEFAULT,
    BrokerSettings,
    EngineId,
    Incarnation,
    Mode,
    Ms,
    PlacementSettings,
    Ppm,
    PrefillerHosts,
    RefusalReason,
    Role,
    Tokens,
    Waiting,
)
from conserve_sdk.core.estimates import averaged_share_ppm
from tests.core.world import CAPACITY, World, answers, engines, granted, only, refused, spec

LONG = Tokens(200_000)


def tiered(*, host_tier: int = 250_000, preset: PlacementSettings = AFFINITY, **settings: Any) -> World:
    """One decoder of 100000 tokens with a host tier, and leases that live long."""
    return World(
        settings=BrokerSettings(placement=preset, ttl_ms=Ms(600_000), observation_max_age_ms=Ms(600_000), **settings),
        fleet=[spec("d0", host_tier_tokens=Tokens(host_tier), max_model_len_tokens=LONG)],
    )


def fill(here: World, tokens: int, conversation: str = "full", **changes: Any) -> Any:
    lease = here.grant(conversation, tokens, **changes)
    here.finish(lease, tokens)
    return lease


class TestIdleAware:
    """A lease that is idle for TAU is not active; leased KV stays under HOVER and the tier."""

    def test_an_idle_lease_makes_room_exactly_after_tau(self) -> None:
        here = tiered()
        fill(here, 80_000)
        asked = here.request("next", 80_000, wait_ms=5_000)
        assert only(Waiting, asked).position == 1
        assert here.broker.next_deadline_ms() == 1_000
        assert answers(here.at(999)) == {}
        (found,) = answers(here.at(1_000)).values()
        assert granted([found]).lease.receipt.waited_ms == 1_000
        assert (here.view("d0").kv_active_tokens, here.view("d0").kv_leased_tokens) == (80_000, 160_000)

    def test_a_turn_makes_it_active_again(self) -> None:
        here = tiered()
        lease = fill(here, 80_000)
        here.at(1_000)
        assert here.view("d0").kv_active_tokens == 0
        here.start(lease, 81_000)
        assert here.view("d0").kv_active_tokens == 81_000
        assert refused(here.request("next", 8_001)).reason is RefusalReason.NO_CAPACITY
        here.finish(lease, 81_000)
        here.at(1_999)
        assert here.view("d0").kv_active_tokens == 81_000
        here.at(2_000)
        assert here.view("d0").kv_active_tokens == 0

    def test_a_parked_lease_is_not_active_at_once_and_holds_nothing(self) -> None:
        here = tiered(hold_share_ppm=1_000_000)
        lease = here.grant("c", 80_000)
        assert (here.view("d0").kv_active_tokens, here.view("d0").kv_holding_tokens) == (80_000, 80_000)
        here.request("next", 80_000, wait_ms=5_000)
        (found,) = answers(here.park(lease)).values()
        assert granted([found]).lease.hold_ms > 0, "what the parked lease held is free again"
        assert (here.view("d0").kv_active_tokens, here.view("d0").kv_holding_tokens) == (80_000, 80_000)

    def test_nobody_waits_so_nothing_is_due(self) -> None:
        here = tiered()
        fill(here, 80_000)
        assert here.broker.next_deadline_ms() == 600_000

    @pytest.mark.parametrize(("tokens", "fits"), [(50_000, True), (50_001, False)])
    def test_leased_kv_stays_under_hover(self, tokens: int, fits: bool) -> None:
        here = tiered()
        for index in range(5):
            fill(here, 50_000, f"c{index}")
            here.wait(1_000)
        found = here.request("last", tokens)
        if fits:
            assert granted(found)
        else:
            receipt = refused(found).receipt
            assert (receipt.rule, receipt.candidates[0].verdict) == ("no_capacity", "oversubscribed")

    @pytest.mark.parametrize(("tokens", "fits"), [(50_000, True), (50_001, False)])
    def test_leased_kv_stays_under_what_the_tier_can_keep(self, tokens: int, fits: bool) -> None:
        here = tiered(host_tier=30_000)
        fill(here, 80_000)
        here.wait(1_000)
        here.request("last", tokens)
        assert (here.broker.lease_count() == 2) is fits

    @pytest.mark.parametrize("change", ["no tier", "switched off"])
    def test_without_a_tier_or_the_switch_every_lease_is_active(self, change: str) -> None:
        preset = AFFINITY if change == "no tier" else replace(AFFINITY, idle_aware=False)
        here = tiered(host_tier=0 if change == "no tier" else 250_000, preset=preset)
        fill(here, 80_000)
        here.wait(5_000)
        assert refused(here.request("next", 9_001)).reason is RefusalReason.NO_CAPACITY
        assert granted(here.request("next", 9_000))

    def test_what_is_scraped_above_the_active_leases_counts(self) -> None:
        here = tiered()
        fill(here, 80_000)
        here.wait(1_000)
        here.observe("d0", kv_used_tokens=Tokens(50_000))
        assert refused(here.request("next", 39_001)).reason is RefusalReason.NO_CAPACITY
        assert granted(here.request("next", 39_000))

    def test_of_two_decoders_the_one_with_less_active_kv_wins(self) -> None:
        here = tiered()
        here.configure(spec("d1"))
        here.observe("d1")
        fill(here, 30_000, hint=EngineId("d0"))
        here.wait(1_000)
        # d0: 10000 active and a quarter of 40000; d1: 10000, and a quarter of them.
        here.grant("other", 12_000, hint=EngineId("d1"))
        assert here.grant("next", 10_000).decoder.engine_id == "d0"

    def test_leases_back_from_the_journal_are_as_idle_as_they_were(self) -> None:
        here = tiered()
        lease = fill(here, 80_000)
        idle = here.broker.lease(lease.lease_id)
        assert idle is not None
        for now_ms, active in ((999, 80_000), (1_000, 0), (5_000, 0)):
            again = tiered()
            again.now_ms = now_ms
            again.recover(idle)
            assert again.view("d0").kv_active_tokens == active


class TestPrefillersHost:
    """A prefiller hosts while it has time to spare, up to its reserve."""

    def world(self, **changes: Any) -> World:
        preset = replace(DEFAULT, **{"prefill_share_window_ms": Ms(1_000), **changes})
        here = World(
            settings=BrokerSettings(placement=preset, observation_max_age_ms=Ms(600_000)),
            fleet=[spec("d0"), spec("p0", Role.PREFILLER, max_model_len_tokens=LONG)],
        )
        here.observe("d0", kv_used_tokens=Tokens(88_000))
        return here

    def test_a_prefiller_starts_as_busy(self) -> None:
        here = self.world()
        assert here.view("p0").prefill_share_ppm == 1_000_000
        assert refused(here.request("c", 2_000)).reason is RefusalReason.NO_CAPACITY
        here.observe("p0")
        assert here.view("p0").prefill_share_ppm == 1_000_000, "no time has passed"
        here.wait(1)
        here.observe("p0")
        assert here.view("p0").prefill_share_ppm == 1_000_000 * 1_000 // 1_001

    @pytest.mark.parametrize(("idle_ms", "hosts"), [(428, False), (429, True)])
    def test_it_hosts_from_exactly_the_gate_on(self, idle_ms: int, hosts: bool) -> None:
        here = self.world()
        here.wait(idle_ms)
        here.observe("p0")
        assert (here.view("p0").prefill_share_ppm <= 700_000) is hosts
        here.request("c", 2_000)
        assert (here.broker.lease_count() == 1) is hosts

    @pytest.mark.parametrize(("gate_ppm", "hosts"), [(699_789, False), (699_790, True)])
    def test_at_the_gate_itself_it_hosts(self, gate_ppm: int, hosts: bool) -> None:
        here = self.world(host_gate_ppm=Ppm(gate_ppm))
        here.wait(429)
        here.observe("p0")
        assert here.view("p0").prefill_share_ppm == 699_790
        here.request("c", 2_000)
        assert (here.broker.lease_count() == 1) is hosts

    def test_whoever_waits_gets_it_when_a_scrape_shows_time_to_spare(self) -> None:
        here = self.world()
        here.request("c", 2_000, wait_ms=60_000)
        here.wait(5_000)
        (found,) = answers(here.observe("p0")).values()
        lease = granted([found]).lease
        assert (lease.decoder.engine_id, lease.mode) == ("p0", Mode.LOCAL)

    def test_never_is_never(self) -> None:
        here = self.world(prefiller_hosts=PrefillerHosts.NEVER)
        here.wait(100_000)
        here.observe("p0")
        assert refused(here.request("c", 2_000)).reason is RefusalReason.NO_CAPACITY

    @pytest.mark.parametrize(("tokens", "fits"), [(74_000, True), (74_001, False)])
    def test_its_reserve_stays_free(self, tokens: int, fits: bool) -> None:
        here = self.world()
        here.wait(10_000)
        here.observe("p0")
        here.request("c", tokens)
        assert (here.broker.lease_count() == 1) is fits

    @pytest.mark.parametrize(
        ("tier", "tokens", "fits"), [(0, 24_000, True), (0, 24_001, False), (250_000, 74_001, False)]
    )
    def test_with_a_host_tier_the_idle_do_not_fill_its_room(self, tier: int, tokens: int, fits: bool) -> None:
        preset = replace(DEFAULT, prefill_share_window_ms=Ms(1_000))
        fleet = [spec("p0", Role.PREFILLER, max_model_len_tokens=LONG, host_tier_tokens=Tokens(tier))]
        here = World(settings=BrokerSettings(placement=preset, observation_max_age_ms=Ms(600_000)), fleet=fleet)
        here.wait(10_000)
        here.observe("p0")
        fill(here, 50_000)
        here.wait(1_000)
        here.request("next", tokens)
        assert (here.broker.lease_count() == 2) is fits
        if tier:
            assert granted(here.request("after", 74_000)).lease.decoder.engine_id == "p0"

    def test_prefills_under_way_count_against_it(self) -> None:
        here = self.world()
        here.observe("d0", running=50)
        remote = here.grant("remote", 9_000)
        assert remote.prefiller is not None
        here.wait(10_000)
        here.observe("p0")
        here.observe("d0", kv_used_tokens=Tokens(88_000))
        assert refused(here.request("c", 65_001)).receipt.candidates
        assert granted(here.request("c", 65_000)).lease.decoder.engine_id == "p0"

    def test_its_share_follows_counted_time_where_there_is_any(self) -> None:
        here = self.world()
        here.observe("p0", prefill_busy_ms_total=Ms(1))
        here.wait(1_000)
        here.observe("p0", prefill_busy_ms_total=Ms(201))
        assert here.view("p0").prefill_share_ppm == (1_000_000 + 200_000) // 2

    def test_tokens_at_an_unknown_rate_mean_busy(self) -> None:
        here = self.world()
        here.wait(1_000)
        here.observe("p0")
        here.wait(1_000)
        here.observe("p0", prefill_tokens_total=Tokens(1))
        assert here.view("p0").prefill_share_ppm == 750_000

    @pytest.mark.parametrize(("role", "share_ppm"), [(Role.PREFILLER, 750_000), (Role.DECODER, 5_000)])
    def test_at_an_unknown_rate_a_decoder_is_as_busy_as_the_default_rate_says(self, role: Role, share_ppm: int) -> None:
        preset = replace(DEFAULT, prefill_share_window_ms=Ms(1_000))
        here = World(settings=BrokerSettings(placement=preset), fleet=[spec("e", role)])
        for tokens in (0, 100):
            here.wait(1_000)
            here.observe("e", prefill_tokens_total=Tokens(tokens))
        assert here.view("e").prefill_share_ppm == share_ppm

    def test_a_restart_makes_it_busy_again(self) -> None:
        here = self.world()
        here.wait(10_000)
        here.observe("p0")
        here.observe("p0", incarnation=Incarnation("i2"))
        assert here.view("p0").prefill_share_ppm == 1_000_000

    @pytest.mark.parametrize(("hosts", "chosen"), [(PrefillerHosts.AUTO, "d1"), (PrefillerHosts.NEVER, "d0")])
    def test_where_prefillers_host_prefill_work_is_load_on_every_engine(
        self, hosts: PrefillerHosts, chosen: str
    ) -> None:
        preset = replace(DEFAULT, prefill_share_window_ms=Ms(1_000), prefiller_hosts=hosts)
        here = World(settings=BrokerSettings(placement=preset), fleet=engines(decoders=2, prefillers=0))
        assert here.view("d0").prefill_share_ppm == 0, "a decoder starts as idle"
        here.observe("d0", prefill_busy_ms_total=Ms(1))
        here.wait(1_000)
        here.observe("d0", prefill_tokens_total=Tokens(900), prefill_busy_ms_total=Ms(91))
        here.observe("d1", kv_used_tokens=Tokens(CAPACITY // 100))
        # d0: 0.3 * 0.045 for its prefill work; d1: 0.01 of its KV, and a quarter of that once more as leased.
        assert here.view("d0").prefill_share_ppm == 45_000
        assert here.grant("c", 2_000).decoder.engine_id == chosen

    def test_two_scrapes_at_one_instant_change_nothing(self) -> None:
        here = self.world()
        here.observe("p0", prefill_tokens_total=Tokens(1_000))
        assert here.view("p0").prefill_share_ppm == 1_000_000


def test_a_share_is_clamped() -> None:
    assert averaged_share_ppm(0, sample_ppm=9_000_000, span_ms=10, window_ms=10) == 500_000
    assert averaged_share_ppm(0, sample_ppm=-5, span_ms=10, window_ms=10) == 0


class TestQuota:
    """`leased_tokens_per_tenant_max`."""

    def world(self, **changes: Any) -> World:
        settings = BrokerSettings(placement=AFFINITY, leased_tokens_per_tenant_max=Tokens(10_000), **changes)
        return World(settings=settings)

    @pytest.mark.parametrize(("tokens", "fits"), [(4_000, True), (4_001, False)])
    def test_a_tenant_holds_exactly_its_quota(self, tokens: int, fits: bool) -> None:
        here = self.world()
        here.grant("a", 6_000)
        found = here.request("b", tokens)
        assert (here.broker.lease_count() == 2) is fits
        if not fits:
            no = refused(found)
            assert (no.reason, no.retry_after_ms) == (RefusalReason.OVER_QUOTA, 1_000)
            assert "6000 of its quota of 10000" in no.detail

    def test_who_is_over_it_holds_up_no_other_tenant_and_goes_on_when_there_is_room(self) -> None:
        here = self.world()
        first = here.grant("a", 6_000)
        here.request("b", 5_000, wait_ms=60_000)
        assert here.grant("c", 9_000, tenant="u")
        (found,) = answers(here.release(first)).values()
        assert granted([found]).lease.ledger_tokens == 5_000

    def test_what_can_never_fit_is_refused_at_once(self) -> None:
        no = refused(self.world().request("a", 10_001, wait_ms=60_000))
        assert (no.reason, no.retry_after_ms) == (RefusalReason.OVER_QUOTA, 0)

    def test_what_fits_an_empty_quota_exactly_waits(self) -> None:
        here = self.world()
        first = here.grant("a", 1_000)
        here.request("b", 10_000, wait_ms=60_000)
        assert len(answers(here.release(first))) == 1
        assert here.broker.lease_count() == 1

    def test_what_is_replaced_does_not_count(self) -> None:
        here = self.world()
        lease = here.grant("a", 9_000)
        assert granted(here.supersede(lease, 9_500)).lease.epoch == 2

    def test_the_ledger_follows_the_turns(self) -> None:
        here = self.world()
        here.finish(here.grant("a", 6_000), 8_000)
        assert refused(here.request("b", 2_001)).reason is RefusalReason.OVER_QUOTA
        assert granted(here.request("b", 2_000))

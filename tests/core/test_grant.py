"""Granting: what a lease says, one live lease per key, and refusing."""

from collections import Counter
from dataclasses import replace

import pytest

from conserve_sdk.core import (
    AFFINITY,
    DEFAULT,
    PAPER,
    Activity,
    BrokerSettings,
    EngineId,
    EngineRemoved,
    EngineSpec,
    Granted,
    LeaseId,
    LeaseStored,
    LineageId,
    Mode,
    Ms,
    Ppm,
    RefusalReason,
    RequestId,
    Role,
    TenantId,
    TenantQuota,
    Tokens,
    Waiting,
)
from tests.core.world import M, World, engines, full_world, granted, key, only, refused, settings, spec

# ---- what is granted ----


def test_a_grant_names_everything_the_client_needs() -> None:
    world = World(now_ms=5)
    decisions = world.request("c", 1_000)
    lease = granted(decisions).lease
    assert decisions == [
        LeaseStored(lease=lease, fresh=True),
        Granted(request_id=RequestId("r1"), lease=lease, reused=False),
    ]
    assert (lease.key, lease.epoch, lease.supersedes) == (key("c"), 1, None)
    assert (lease.mode, lease.decoder.engine_id, lease.decoder.url) == (Mode.MIGRATE, "d0", "http://d0")
    assert lease.prefiller is not None
    assert (lease.prefiller.engine_id, lease.prefiller.incarnation) == ("p0", "i1")
    assert (lease.granted_at_ms, lease.ttl_ms, lease.expires_at_ms) == (5, 60_000, 60_005)
    assert (lease.ledger_tokens, lease.activity, lease.turns, lease.migrations) == (1_000, Activity.BUSY, 0, 0)
    assert world.broker.lease(lease.lease_id) == world.broker.live_lease_of(key("c")) == lease
    assert list(world.broker.leases()) == [lease]


def test_the_receipt_says_what_was_weighed() -> None:
    receipt = World().grant("c").receipt
    assert (receipt.preset, receipt.rule, receipt.prefill_rule) == ("paper", "most_free_kv", "always_prefiller")
    assert [(each.role, each.engine_id, each.verdict) for each in receipt.candidates] == [
        ("decoder", "d0", "chosen"),
        ("decoder", "d1", "fits"),
        ("prefiller", "p0", "chosen"),
    ]


def test_the_rules_that_fired_are_counted() -> None:
    world = World()
    receipts = [world.grant(name).receipt for name in ("a", "b")]
    receipts.append(world.grant("c", hint=EngineId("d0")).receipt)
    counters = world.broker.counters
    assert counters.decoder_rules == Counter(receipt.rule for receipt in receipts)
    assert counters.prefill_rules == Counter(receipt.prefill_rule for receipt in receipts)


def test_leases_go_round_the_emptiest_decoders() -> None:
    world = World(fleet=engines(decoders=3))
    chosen = [world.grant(f"c{index}", 1_000).decoder.engine_id for index in range(6)]
    assert chosen == ["d0", "d1", "d2", "d0", "d1", "d2"]


def test_affinity_never_uses_a_prefiller() -> None:
    lease = World(settings=BrokerSettings(placement=AFFINITY)).grant("c")
    assert (lease.mode, lease.prefiller, lease.receipt.prefill_rule) == (Mode.LOCAL, None, "never")


def test_the_growth_reserve_is_part_of_the_ledger() -> None:
    world = World(settings=settings(placement=replace(PAPER, reserve_tokens=Tokens(500))))
    lease = world.grant("c", 1_000)
    assert lease.ledger_tokens == lease.receipt.need_tokens == 1_500
    assert world.view("p0").backlog_tokens == 1_000


# ---- idempotence ----


def test_the_same_key_gets_the_same_lease_and_extends_it() -> None:
    world = World()
    lease = world.grant("c")
    world.at(1_000)
    again = granted(world.request("c"))
    assert again.reused
    assert again.lease == replace(lease, expires_at_ms=Ms(61_000))
    assert (world.broker.counters.granted, world.broker.counters.reused, world.broker.lease_count()) == (1, 1, 1)


@pytest.mark.parametrize("other", [key("x"), replace(key("c"), lineage=LineageId("side")), key("c", tenant="u")])
def test_any_other_key_is_another_lease(other: object) -> None:
    world = World()
    first = world.grant("c")
    second = granted(world.request("c", key=other)).lease
    assert first.lease_id != second.lease_id


def test_a_parked_lease_is_back_in_use_when_asked_for() -> None:
    world = World()
    lease = world.grant("c")
    world.park(lease)
    world.at(500)
    decisions = world.request("c")
    lease = granted(decisions).lease
    assert (lease.activity, lease.activity_since_ms, lease.expires_at_ms) == (Activity.BUSY, 500, 60_500)
    assert only(LeaseStored, decisions).lease == lease


def test_ids_are_used_once() -> None:
    world = World()
    world.grant("c")
    with pytest.raises(AssertionError, match="already live"):
        world.request("d", lease_id=LeaseId("l1"))


# ---- refusals ----


def test_an_unknown_model_is_refused_at_once() -> None:
    refusal = refused(World().request("c", model="other", wait_ms=5_000))
    assert (refusal.reason, refusal.retry_after_ms) == (RefusalReason.UNKNOWN_MODEL, 0)


def test_a_waiting_request_is_refused_when_its_model_leaves() -> None:
    world = World(fleet=[spec("d0")])
    world.drain("d0")
    world.request("c", wait_ms=5_000)
    refusal = refused(world.apply(EngineRemoved(now_ms=Ms(0), engine_id=EngineId("d0"))))
    assert refusal.reason is RefusalReason.UNKNOWN_MODEL
    assert world.broker.waiting() == 0


@pytest.mark.parametrize(("tokens", "fits"), [(32_768, True), (32_769, False)])
def test_a_prompt_longer_than_the_model_is_refused_at_once(tokens: int, fits: bool) -> None:
    decisions = World().request("c", tokens, wait_ms=5_000)
    if fits:
        granted(decisions)
    else:
        refusal = refused(decisions)
        assert (refusal.reason, refusal.retry_after_ms) == (RefusalReason.PROMPT_TOO_LONG, 0)
        assert "takes 32768" in refusal.detail


@pytest.mark.parametrize(("tokens", "fits"), [(89_000, True), (89_001, False)])
def test_a_prompt_that_no_decoder_could_ever_hold_is_refused_at_once(tokens: int, fits: bool) -> None:
    world = World(fleet=engines(decoders=1), settings=BrokerSettings(placement=DEFAULT))
    world.observe("d0", max_model_len_tokens=Tokens(0))
    decisions = world.request("c", tokens, wait_ms=5_000)
    if fits:
        granted(decisions)
    else:
        assert refused(decisions).reason is RefusalReason.PROMPT_TOO_LONG


def test_the_watermark_counts_the_larger_of_ledger_and_scrape_not_their_sum() -> None:
    world = World(fleet=engines(decoders=1), settings=settings(placement=replace(PAPER, kv_watermark_ppm=Ppm(500_000))))
    world.grant("a", 20_000)
    world.observe("d0", kv_used_tokens=Tokens(30_000))
    assert refused(world.request("b", 20_001)).reason is RefusalReason.NO_CAPACITY
    granted(world.request("b", 20_000))
    assert refused(world.request("c", 10_001)).reason is RefusalReason.NO_CAPACITY
    granted(world.request("c", 10_000))


def test_while_a_decoder_is_not_known_nothing_is_too_long() -> None:
    world = World(fleet=[spec("d0")])
    world.configure(spec("d1"))
    only(Waiting, world.request("c", 50_000, wait_ms=5_000))


def test_without_a_ready_decoder_the_refusal_names_each() -> None:
    world = World()
    world.drain("d0")
    world.blame("d1")
    refusal = refused(world.request("c"))
    assert (refusal.reason, refusal.retry_after_ms) == (RefusalReason.NO_READY_ENGINE, 1_000)
    assert "d0 draining, d1 suspect" in refusal.detail


def test_prefillers_alone_host_nothing() -> None:
    refusal = refused(World(fleet=[spec("p0", Role.PREFILLER)]).request("c"))
    assert refusal.reason is RefusalReason.NO_READY_ENGINE
    assert "none configured" in refusal.detail


def test_a_decoder_of_unknown_capacity_gets_nothing() -> None:
    world = World(fleet=[spec("d0")])
    world.observe("d0", kv_capacity_tokens=Tokens(0))
    assert "d0 capacity_unknown" in refused(world.request("c")).detail


def test_only_the_decoders_that_take_the_prompt_are_weighed() -> None:
    world = World()
    world.observe("d0", max_model_len_tokens=Tokens(900))
    lease = world.grant("c", 1_000)
    assert lease.decoder.engine_id == "d1"
    assert lease.receipt.candidates[0].verdict == "prompt_too_long"


# ---- bounds ----


def test_the_queue_is_bounded() -> None:
    world = full_world(queue_max=2)
    only(Waiting, world.request("a", wait_ms=5_000))
    only(Waiting, world.request("b", wait_ms=5_000))
    refusal = refused(world.request("c", wait_ms=5_000))
    assert (refusal.reason, refusal.retry_after_ms) == (RefusalReason.QUEUE_FULL, 1_000)
    assert world.broker.waiting() == 2


@pytest.mark.parametrize("bound", [{"leases_max": 2}, {"leases_per_tenant_max": 2}])
def test_leases_are_bounded(bound: dict[str, int]) -> None:
    world = World(settings=settings(**bound))
    first = world.grant("a")
    world.grant("b")
    refusal = refused(world.request("c", wait_ms=5_000))
    assert (refusal.reason, refusal.retry_after_ms) == (RefusalReason.TOO_MANY_LEASES, 1_000)
    assert refusal.receipt.need_tokens == 0, "its need was not even looked at"
    assert granted(world.request("a")).reused
    assert granted(world.supersede(first)).lease.epoch == 2
    assert world.broker.counters.refused[RefusalReason.TOO_MANY_LEASES] == 1


def test_a_tenants_bound_is_its_own() -> None:
    world = World(settings=settings(leases_per_tenant_max=1))
    world.grant("a")
    world.grant("a", tenant="u")


def test_one_tenants_own_bounds_take_the_place_of_those_for_all() -> None:
    quotas = {TenantId("u"): TenantQuota(leases_max=2, leased_tokens_max=Tokens(3_000))}
    world = World(settings=settings(leases_per_tenant_max=1, tenant_quotas=quotas))
    world.grant("a", 1_000, tenant="u")
    assert refused(world.request("b", 2_001, tenant="u")).reason is RefusalReason.OVER_QUOTA
    world.grant("b", 2_000, tenant="u")
    assert refused(world.request("c", 1, tenant="u")).reason is RefusalReason.TOO_MANY_LEASES
    world.grant("a", 9_000)
    assert refused(world.request("b")).reason is RefusalReason.TOO_MANY_LEASES


# ---- tokens from bytes ----


def test_a_count_of_one_is_a_count() -> None:
    assert World().grant("c", 1, first_turn_input_bytes=4_001).ledger_tokens == 1


def test_bytes_are_converted_when_there_is_no_count() -> None:
    lease = World().grant("c", 0, first_turn_input_bytes=4_001)
    assert lease.ledger_tokens == 1_001


def test_an_estimate_is_not_refused_for_being_a_little_too_long() -> None:
    world = World()
    lease = world.grant("c", 0, first_turn_input_bytes=4 * 65_536)
    assert lease.ledger_tokens == 32_768
    assert refused(world.request("d", 0, first_turn_input_bytes=8 * 32_769)).reason is RefusalReason.PROMPT_TOO_LONG


# ---- holding ----


def test_holding_is_bounded_by_settings_and_engine() -> None:
    assert World().grant("c").hold_ms == 10_000
    assert World(settings=settings(hold_ms=Ms(40_000))).grant("c").hold_ms == 30_000
    assert World(fleet=[spec("d0", max_hold_ms=Ms(1))]).grant("c").hold_ms == 1
    silent = EngineSpec(engine_id=EngineId("d0"), url="http://d0", role=Role.DECODER, model=M)
    assert World(fleet=[silent]).grant("c").hold_ms == 0, "who does not say how long it can hold cannot"


def test_holding_leases_fill_only_their_share_of_a_decoder() -> None:
    world = World(fleet=engines(decoders=1))
    assert world.grant("a", 30_000).hold_ms == 10_000
    assert world.grant("b", 20_001).hold_ms == 0
    assert world.grant("c", 20_000).hold_ms == 10_000
    assert world.view("d0").kv_holding_tokens == 50_000

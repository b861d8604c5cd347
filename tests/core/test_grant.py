"""Granting: what a lease says, one live lease per key, waiting and refusing."""

from collections import Counter
from dataclasses import replace

import pytest

from conserve_sdk.core import (
    AFFINITY,
    DEFAULT,
    PAPER,
    Activity,
    BrokerSettings,
    DropReason,
    EngineId,
    EngineRemoved,
    Granted,
    LeaseDropped,
    LeaseId,
    LeaseStored,
    LineageId,
    Mode,
    ModelName,
    Ms,
    Ppm,
    RefusalReason,
    RequestCancelled,
    RequestId,
    Role,
    TenantId,
    TenantQuota,
    Tokens,
    Waiting,
)
from tests.core.world import CAPACITY, World, answers, engines, granted, key, only, refused, spec


def settings(**changes: object) -> BrokerSettings:
    return replace(BrokerSettings(placement=PAPER), **changes)  # type: ignore[arg-type]


# ---- what is granted ----


def test_a_grant_names_everything_the_client_needs() -> None:
    world = World(now_ms=5)
    decisions = world.request("c", 1_000)
    lease = granted(decisions).lease
    assert decisions == [LeaseStored(lease=lease), Granted(request_id=RequestId("r1"), lease=lease, reused=False)]
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


# ---- waiting ----


def full_world(**changes: object) -> World:
    """One decoder, all of whose KV is leased to conversation `first`."""
    world = World(fleet=engines(decoders=1), settings=settings(**changes))
    world.observe("d0", max_model_len_tokens=Tokens(0))
    world.grant("first", CAPACITY)
    return world


def test_without_patience_there_is_a_refusal_with_a_reason() -> None:
    refusal = refused(full_world().request("c"))
    assert (refusal.reason, refusal.retry_after_ms) == (RefusalReason.NO_CAPACITY, 1_000)
    assert "1000 tokens" in refusal.detail
    assert [each.verdict for each in refusal.receipt.candidates] == ["over_watermark"]
    assert refusal.receipt.rule == "no_capacity"


def test_a_request_waits_and_is_granted_when_room_appears() -> None:
    world = full_world()
    first = next(world.broker.leases())
    world.wait(50)
    assert only(Waiting, world.request("c", wait_ms=5_000)).position == 1
    world.wait(100)
    decisions = world.release(first)
    lease = granted(decisions).lease
    assert (lease.key, lease.receipt.waited_ms, lease.granted_at_ms) == (key("c"), 100, 150)
    assert [type(each).__name__ for each in decisions] == ["LeaseDropped", "LeaseAnswered", "LeaseStored", "Granted"]
    assert world.broker.waiting() == 0


def test_room_appears_when_a_report_shrinks_a_ledger() -> None:
    world = full_world()
    first = next(world.broker.leases())
    world.request("c", wait_ms=5_000)
    assert granted(world.finish(first, CAPACITY - 1_000)).lease.key == key("c")


def test_room_appears_when_a_lease_expires() -> None:
    world = full_world()
    world.request("c", wait_ms=100_000)
    assert world.broker.next_deadline_ms() == 60_000
    world.now_ms = 59_999
    world.observe("d0")
    assert granted(world.at(60_000)).lease.key == key("c")


def test_room_appears_when_an_engine_is_seen_undrained_or_added() -> None:
    world = World(fleet=[])
    world.configure(spec("d0"))
    world.request("a", wait_ms=5_000)
    assert granted(world.observe("d0")).lease.key == key("a")
    world.drain("d0")
    world.request("b", wait_ms=5_000)
    assert granted(world.drain("d0", draining=False)).lease.key == key("b")
    world.configure(replace(spec("d0"), kv_capacity_tokens=Tokens(2_000)))
    world.request("c", wait_ms=5_000)
    assert granted(world.configure(replace(spec("d0"), kv_capacity_tokens=Tokens(9_000)))).lease.key == key("c")


@pytest.mark.parametrize(("late", "left"), [(-1, 1), (0, 0), (1, 0)])
def test_a_request_waits_until_exactly_its_deadline(late: int, left: int) -> None:
    world = full_world()
    world.request("c", wait_ms=5_000)
    assert world.broker.next_deadline_ms() == 5_000
    decisions = world.at(5_000 + late)
    assert world.broker.waiting() == left
    assert [each.reason for each in decisions] == [RefusalReason.NO_CAPACITY] * (1 - left)  # type: ignore[union-attr]


def test_patience_is_bounded_by_the_broker() -> None:
    world = full_world(wait_max_ms=Ms(700))
    world.request("c", wait_ms=5_000)
    assert world.broker.next_deadline_ms() == 700


def test_room_at_the_deadline_is_still_given() -> None:
    world = full_world(ttl_ms=Ms(5_000))
    world.request("c", wait_ms=5_000)
    assert granted(world.at(5_000)).lease.key == key("c")


def test_the_next_in_line_gets_a_look_when_the_head_runs_out_of_time() -> None:
    world = World(fleet=engines(decoders=1))
    world.observe("d0", max_model_len_tokens=Tokens(0))
    world.grant("first", CAPACITY - 1_000)
    world.request("big", CAPACITY, wait_ms=5_000)
    world.request("small", 1_000, wait_ms=5_000)
    outcome = answers(world.at(5_000))
    assert isinstance(outcome[RequestId("r2")], type(refused(list(outcome.values()))))
    assert granted(list(outcome.values())).lease.key == key("small")


def test_nobody_overtakes_in_a_tenants_line() -> None:
    world = World(fleet=engines(decoders=1))
    world.observe("d0", max_model_len_tokens=Tokens(0))
    world.grant("first", CAPACITY - 1_000)
    world.request("big", CAPACITY, wait_ms=5_000)
    assert only(Waiting, world.request("small", 1_000, wait_ms=5_000)).position == 2
    impatient = refused(world.request("impatient", 1_000))
    assert (impatient.reason, impatient.receipt.candidates) == (RefusalReason.NO_CAPACITY, ())
    assert "earlier requests" in impatient.detail


def test_a_head_that_does_not_fit_never_holds_up_another_tenant_or_model() -> None:
    world = World(fleet=[*engines(decoders=1), spec("e0", model=ModelName("n"))])
    world.observe("d0", max_model_len_tokens=Tokens(0))
    world.grant("first", CAPACITY - 1_000)
    world.request("big", CAPACITY, wait_ms=5_000)
    granted(world.request("small", 1_000, tenant="u"))
    granted(world.request("small", 1_000, model="n"))


def test_a_cancelled_request_is_never_answered_and_lets_the_next_in() -> None:
    world = World(fleet=engines(decoders=1))
    world.observe("d0", max_model_len_tokens=Tokens(0))
    world.grant("first", CAPACITY - 1_000)
    world.request("big", CAPACITY, wait_ms=5_000)
    world.request("small", 1_000, wait_ms=5_000)
    decisions = world.apply(RequestCancelled(now_ms=Ms(0), request_id=RequestId("r2")))
    assert answers(decisions).keys() == {"r3"}
    assert world.apply(RequestCancelled(now_ms=Ms(0), request_id=RequestId("r2"))) == []
    assert world.at(5_000) == []


def test_all_who_wait_for_one_key_get_the_same_lease() -> None:
    world = full_world()
    first = next(world.broker.leases())
    for _ in range(3):
        world.request("c", wait_ms=5_000)
    outcome = answers(world.release(first))
    assert {each.lease.lease_id for each in outcome.values() if isinstance(each, Granted)} == {"l2"}
    assert [each.reused for each in outcome.values() if isinstance(each, Granted)] == [False, True, True]
    assert world.broker.waiting() == 0


@pytest.mark.parametrize("conversation", ["d", "first"], ids=["must wait", "is answered at once"])
def test_a_request_id_waits_once(conversation: str) -> None:
    world = full_world()
    world.request("c", wait_ms=5_000)
    with pytest.raises(AssertionError, match="already waits"):
        world.request(conversation, wait_ms=5_000, request_id=RequestId("r2"))


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
    assert World(fleet=[spec("d0", max_hold_ms=Ms(0))]).grant("c").hold_ms == 0


def test_holding_leases_fill_only_their_share_of_a_decoder() -> None:
    world = World(fleet=engines(decoders=1))
    assert world.grant("a", 30_000).hold_ms == 10_000
    assert world.grant("b", 20_001).hold_ms == 0
    assert world.grant("c", 20_000).hold_ms == 10_000
    assert world.view("d0").kv_holding_tokens == 50_000


# ---- superseding ----


def test_a_superseding_lease_has_the_next_epoch_and_frees_the_old_one() -> None:
    world = World()
    old = world.grant("c", 1_000)
    decisions = world.supersede(old, 1_200, failed_engine_id=EngineId("d0"))
    new = granted(decisions).lease
    assert [type(each).__name__ for each in decisions] == ["LeaseDropped", "LeaseStored", "Granted"]
    assert only(LeaseDropped, decisions) == LeaseDropped(lease=old, reason=DropReason.SUPERSEDED)
    assert (new.epoch, new.supersedes, new.decoder.engine_id) == (2, old.lease_id, "d1")
    assert (world.view("d0").kv_leased_tokens, world.view("d1").kv_leased_tokens) == (0, 1_200)
    assert (world.broker.counters.superseded, world.broker.counters.granted) == (1, 2)


def test_ten_concurrent_failures_make_one_new_lease() -> None:
    world = World()
    old = world.grant("c")
    outcomes = [granted(world.supersede(old, failed_engine_id=EngineId("d0"))) for _ in range(10)]
    assert len({outcome.lease.lease_id for outcome in outcomes}) == 1
    assert [outcome.reused for outcome in outcomes] == [False] + [True] * 9
    assert world.broker.lease_count() == 1


@pytest.mark.parametrize("epoch", [1, 3])
def test_another_epoch_replaces_nothing(epoch: int) -> None:
    world = World()
    live = granted(world.supersede(world.grant("c"))).lease
    outcome = granted(world.supersede(live, epoch=epoch))
    assert (outcome.lease.lease_id, outcome.reused) == (live.lease_id, True)


def test_a_late_supersede_does_not_replace_a_lease_it_never_knew() -> None:
    """The old lease ended, the key has a fresh one: same epoch, another id."""
    world = World()
    old = world.grant("c")
    world.release(old)
    fresh = world.grant("c")
    assert fresh.epoch == old.epoch
    outcome = granted(world.supersede(old))
    assert (outcome.lease.lease_id, outcome.reused) == (fresh.lease_id, True)


def test_superseding_a_dead_lease_is_a_grant_with_the_next_epoch() -> None:
    world = World()
    old = world.grant("c")
    world.release(old)
    new = granted(world.supersede(old)).lease
    assert (new.epoch, new.supersedes) == (2, old.lease_id)


def test_superseding_counts_the_room_of_the_lease_it_replaces() -> None:
    world = full_world()
    first = next(world.broker.leases())
    world.observe("d0", kv_used_tokens=Tokens(CAPACITY), max_model_len_tokens=Tokens(0))
    new = granted(world.supersede(first, CAPACITY, failed_engine_id=EngineId("p0"))).lease
    assert (new.decoder.engine_id, new.mode, new.receipt.prefill_rule) == ("d0", Mode.LOCAL, "failed")


def test_a_waiting_supersede_leaves_the_old_lease_alone_until_it_is_granted() -> None:
    world = World(fleet=engines(decoders=1))
    old = world.grant("c")
    only(Waiting, world.supersede(old, wait_ms=5_000, failed_engine_id=EngineId("d0")))
    assert world.broker.live_lease_of(key("c")) == old
    refusal = refused(world.at(5_000))
    assert (refusal.reason, refusal.receipt.candidates[0].verdict) == (RefusalReason.NO_READY_ENGINE, "failed")
    assert world.broker.live_lease_of(key("c")) == old


def test_two_waiting_supersedes_make_one_lease() -> None:
    world = World(fleet=engines(decoders=2))
    old = world.grant("c")
    world.drain("d1")
    for _ in range(2):
        world.supersede(old, wait_ms=5_000, failed_engine_id=EngineId("d0"))
    outcome = answers(world.drain("d1", draining=False))
    assert [each.reused for each in outcome.values() if isinstance(each, Granted)] == [False, True]
    assert [lease.epoch for lease in world.broker.leases()] == [2]


def test_the_room_a_waiting_supersede_frees_goes_to_the_next() -> None:
    world = World(fleet=engines(decoders=2))
    world.observe("d0", max_model_len_tokens=Tokens(0))
    moved = world.grant("moved", 60_000)
    world.drain("d1")
    world.observe("d1", kv_used_tokens=Tokens(30_000), max_model_len_tokens=Tokens(0))
    world.request("big", 90_000, tenant="u", wait_ms=5_000)
    world.supersede(moved, 60_000, failed_engine_id=EngineId("d0"), wait_ms=5_000)
    outcome = answers(world.drain("d1", draining=False))
    decoders = {each.lease.key.conversation_id: each.lease.decoder.engine_id for each in outcome.values()}  # type: ignore[union-attr]
    assert decoders == {"moved": "d1", "big": "d0"}


def test_a_request_that_meets_a_supersede_gets_the_successor() -> None:
    world = World()
    old = world.grant("c")
    new = granted(world.supersede(old)).lease
    again = granted(world.request("c"))
    assert (again.lease.lease_id, again.reused) == (new.lease_id, True)

"""Moves of live leases: directives and how they are carried out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conserve_sdk.core import (
    AFFINITY,
    DEFAULT,
    PAPER,
    BrokerSettings,
    Directive,
    EngineId,
    Incarnation,
    Lease,
    Mode,
    MoveReason,
    Ms,
    PlacementSettings,
    Role,
    SupersedeCause,
    Tokens,
    TransferGroup,
)
from tests.core.world import World, answer, granted, spec

CAPACITY = 100_000
RESTED = 10_000


def world(preset: PlacementSettings = AFFINITY, **changes: Any) -> World:
    settings = BrokerSettings(
        placement=replace(preset, **changes), ttl_ms=Ms(600_000), observation_max_age_ms=Ms(60_000)
    )
    return World(settings=settings, fleet=[spec("d0"), spec("d1")])


def idle_lease(here: World, tokens: int = 10_000, conversation: str = "c") -> Lease:
    """A lease on d0, one turn old and in a gap that is long enough."""
    lease = here.grant(conversation, tokens, hint=EngineId("d0"))
    assert lease.decoder.engine_id == "d0"
    here.finish(lease, tokens)
    return here.broker.lease(lease.lease_id) or lease


def told(here: World, lease: Lease) -> MoveReason | None:
    answered = here.renew(lease)
    assert (answered.directive is Directive.RE_LEASE) is (answered.move_reason is not None)
    return answered.move_reason


def follow(here: World, lease: Lease, tokens: int = 10_000, **changes: Any) -> tuple[Lease, bool]:
    options: dict[str, Any] = {"cause": SupersedeCause.RE_LEASE, "cached_tokens": Tokens(tokens), **changes}
    found = granted(here.supersede(lease, tokens, **options))
    return found.lease, found.reused


# ---- draining ----


def test_whoever_is_on_a_draining_decoder_is_told_to_leave_and_takes_its_kv_along() -> None:
    here = world()
    lease = idle_lease(here)
    assert told(here, lease) is None
    here.drain("d0")
    assert told(here, lease) is MoveReason.DRAINING
    moved, reused = follow(here, lease, 12_000, cached_tokens=Tokens(10_000))
    assert (reused, moved.decoder.engine_id, moved.mode) == (False, "d1", Mode.MIGRATE)
    assert moved.prefiller is not None
    assert (moved.prefiller, moved.epoch, moved.supersedes) == (lease.decoder, 2, lease.lease_id)
    assert (moved.receipt.rule, moved.receipt.prefill_rule) == ("re_lease_draining", "old_decoder")
    assert here.view("d0").backlog_tokens == 2_000, "the old decoder computes only what it does not hold"
    assert here.view("d0").kv_leased_tokens == 0
    assert here.broker.counters.moved[MoveReason.DRAINING] == 1


@pytest.mark.parametrize(
    ("cached", "prefiller", "uncached"), [(0, None, 10_000), (1, "d0", 9_999), (10_000, "d0", 0), (10_001, "d0", 0)]
)
def test_what_the_old_decoder_holds_is_what_it_need_not_compute(
    cached: int, prefiller: str | None, uncached: int
) -> None:
    here = world()
    lease = idle_lease(here)
    here.drain("d0")
    moved, _ = follow(here, lease, cached_tokens=Tokens(cached))
    assert (moved.prefiller and moved.prefiller.engine_id) == prefiller
    assert here.view(prefiller or "d1").backlog_tokens == uncached


def test_a_busy_lease_is_told_too_and_a_parked_one_is_not() -> None:
    here = world()
    lease = here.grant("c", hint=EngineId("d0"))
    here.drain("d0")
    assert answer(here.start(lease, 10)).move_reason is MoveReason.DRAINING
    assert answer(here.finish(lease, 10)).move_reason is MoveReason.DRAINING
    assert answer(here.park(lease)).move_reason is None
    assert told(here, lease) is None


def test_nobody_is_sent_away_while_nothing_else_has_room() -> None:
    here = world()
    here.observe("d1", kv_used_tokens=Tokens(80_000))
    lease = idle_lease(here)
    here.drain("d0")
    assert told(here, lease) is None
    assert follow(here, lease) == (here.broker.lease(lease.lease_id), True)
    assert here.broker.counters.stayed[SupersedeCause.RE_LEASE] == 1
    here.observe("d1")
    assert told(here, lease) is MoveReason.DRAINING


def test_the_failed_engine_is_no_target() -> None:
    here = world()
    lease = idle_lease(here)
    here.drain("d0")
    assert follow(here, lease, failed_engine_id=EngineId("d1"))[1]


def test_undraining_withdraws_the_directive() -> None:
    here = world()
    lease = idle_lease(here)
    here.drain("d0")
    assert told(here, lease) is MoveReason.DRAINING
    here.drain("d0", draining=False)
    assert told(here, lease) is None
    counters = here.broker.counters
    assert (counters.directives[MoveReason.DRAINING], counters.withdrawn) == (1, 1)


@pytest.mark.parametrize("hindrance", ["group", "no group", "block size", "lost", "stale"])
def test_where_kv_cannot_move_the_new_decoder_prefills(hindrance: str) -> None:
    here = world()
    match hindrance:
        case "group":
            here.configure(spec("d1", transfer_group=TransferGroup("other")))
        case "no group":
            for engine_id in ("d0", "d1"):
                here.configure(spec(engine_id, transfer_group=TransferGroup("")))
        case "block size":
            here.configure(spec("d1", transfer_group=TransferGroup("")))
            here.observe("d1", block_size_tokens=Tokens(32))
    lease = idle_lease(here)
    here.drain("d0")
    if hindrance == "stale":
        here.wait(60_001)
        here.observe("d1")
    moved, _ = follow(here, lease, cached_tokens=Tokens(0 if hindrance == "lost" else 9_000))
    assert (moved.decoder.engine_id, moved.mode, moved.prefiller) == ("d1", Mode.LOCAL, None)
    assert moved.receipt.prefill_rule == "cannot_move"
    assert here.view("d1").backlog_tokens == 10_000


def test_a_decoder_that_kv_can_reach_is_preferred_to_an_emptier_one() -> None:
    here = world()
    here.configure(spec("a", transfer_group=TransferGroup("other")))
    here.observe("a")
    here.observe("d1", kv_used_tokens=Tokens(50_000))
    lease = idle_lease(here)
    here.drain("d0")
    assert follow(here, lease)[0].decoder.engine_id == "d1"


def test_preset_paper_moves_nothing() -> None:
    here = world(PAPER)
    lease = idle_lease(here)
    here.drain("d0")
    assert told(here, lease) is None
    assert follow(here, lease)[1]
    assert granted(here.supersede(lease, cause=SupersedeCause.APPEND)).reused


# ---- load ----


def loaded(here: World, used: int) -> Lease:
    """An idle, rested lease of 10000 tokens on d0, whose load is 1.25 times what is used there."""
    lease = idle_lease(here)
    here.wait(RESTED)
    here.observe("d0", kv_used_tokens=Tokens(used))
    here.observe("d1")
    return here.broker.lease(lease.lease_id) or lease


def test_a_gap_of_exactly_the_threshold_moves_nothing() -> None:
    here = world()
    assert told(here, loaded(here, 24_000)) is None
    here = world()
    assert told(here, loaded(here, 24_001)) is MoveReason.LOAD


def test_a_directive_stands_until_the_gap_is_half_of_the_threshold() -> None:
    here = world()
    lease = loaded(here, 30_000)
    assert told(here, lease) is MoveReason.LOAD
    here.observe("d0", kv_used_tokens=Tokens(12_001))
    assert told(here, lease) is MoveReason.LOAD
    here.observe("d0", kv_used_tokens=Tokens(12_000))
    assert told(here, lease) is None
    here.observe("d0", kv_used_tokens=Tokens(12_001))
    assert told(here, lease) is None


def test_what_moved_because_of_load_has_one_migration_left() -> None:
    here = world()
    lease = loaded(here, 40_000)
    assert told(here, lease) is MoveReason.LOAD
    moved, reused = follow(here, lease)
    assert (reused, moved.decoder.engine_id, moved.receipt.rule) == (False, "d1", "re_lease_load")
    here.finish(moved, 10_100, migrated=True)
    here.finish(moved, 10_200, migrated=True)
    after = here.broker.lease(moved.lease_id)
    assert after is not None
    assert after.migrations == 1
    assert here.broker.counters.moved[MoveReason.LOAD] == 1


def test_a_move_that_would_only_swap_the_loads_is_not_worth_it() -> None:
    here = world()
    lease = idle_lease(here, 30_000)
    here.wait(RESTED)
    here.observe("d0")
    here.observe("d1")
    assert told(here, lease) is None, "d1 would be as loaded as d0 is now"
    here.observe("d0", kv_used_tokens=Tokens(30_001))
    assert told(here, lease) is MoveReason.LOAD


@pytest.mark.parametrize(("gap_ms", "stays"), [(50, True), (51, False)])
def test_a_gap_must_be_long_enough_when_the_directive_is_carried_out(gap_ms: int, stays: bool) -> None:
    here = world()
    lease = loaded(here, 40_000)
    here.start(lease, 10_000)
    assert answer(here.finish(lease, 10_000)).move_reason is MoveReason.LOAD, "announced as the gap begins"
    here.wait(gap_ms)
    assert follow(here, lease)[1] is stays


def test_a_turn_is_never_moved_because_of_load() -> None:
    here = world()
    lease = loaded(here, 40_000)
    assert answer(here.start(lease, 10_000)).move_reason is None
    assert follow(here, lease)[1]


def test_a_standing_directive_is_not_withdrawn_by_a_turn() -> None:
    here = world()
    lease = loaded(here, 40_000)
    assert told(here, lease) is MoveReason.LOAD
    assert answer(here.start(lease, 10_000)).move_reason is MoveReason.LOAD


def test_a_fresh_lease_stays() -> None:
    here = world()
    lease = idle_lease(here)
    here.observe("d0", kv_used_tokens=Tokens(80_000))
    here.wait(4_999)
    assert told(here, lease) is None
    here.wait(1)
    assert told(here, lease) is MoveReason.LOAD


def test_of_many_that_were_told_only_so_many_move_as_even_the_loads_out() -> None:
    here = world()
    leases = [idle_lease(here, 10_000, f"c{index}") for index in range(1)]
    here.observe("d1", kv_used_tokens=Tokens(80_000))
    leases += [idle_lease(here, 10_000, f"more{index}") for index in range(7)]
    here.wait(RESTED)
    here.observe("d0", kv_used_tokens=Tokens(80_000))
    here.observe("d1")
    assert {told(here, lease) for lease in leases} == {MoveReason.LOAD}
    for lease in leases:
        here.observe("d0", kv_used_tokens=Tokens(here.view("d0").kv_leased_tokens))
        moved, reused = follow(here, lease)
        here.finish(moved, 10_000)
        here.wait(60)
        assert reused or moved.decoder.engine_id == "d1"
    assert here.view("d1").leases == 4
    assert {told(here, lease) for lease in here.broker.leases()} == {None}
    here.wait(RESTED)
    here.observe("d0")
    here.observe("d1")
    assert {told(here, lease) for lease in here.broker.leases()} == {None}, "nothing goes back"


def test_load_moves_no_lease_that_would_have_to_be_prefilled_again() -> None:
    here = world()
    here.configure(spec("d1", transfer_group=TransferGroup("other")))
    assert told(here, loaded(here, 80_000)) is None


def test_a_decoder_that_fails_gives_no_directive() -> None:
    here = world()
    lease = loaded(here, 80_000)
    here.blame("d0")
    assert told(here, lease) is None
    assert follow(here, lease)[1]


def test_a_lease_whose_decoder_is_not_configured_stays() -> None:
    here = world(DEFAULT)
    lease = replace(idle_lease(here), expires_at_ms=Ms(1_000_000))
    elsewhere = World(settings=here.settings, fleet=[])
    elsewhere.serial = here.serial
    elsewhere.recover(lease)
    assert told(elsewhere, lease) is None
    assert granted(elsewhere.supersede(lease, cause=SupersedeCause.APPEND)).reused


def test_a_prefiller_that_prefills_again_sends_its_conversations_away() -> None:
    here = World(
        settings=BrokerSettings(
            placement=replace(DEFAULT, prefill_share_window_ms=Ms(1_000)),
            ttl_ms=Ms(600_000),
            observation_max_age_ms=Ms(60_000),
        ),
        fleet=[spec("d0"), spec("p0", Role.PREFILLER)],
    )
    here.observe("d0", kv_used_tokens=Tokens(80_000))
    here.wait(10_000)
    here.observe("p0")
    lease = here.grant("c", 8_000)
    assert (lease.decoder.engine_id, lease.mode, lease.hold_ms) == ("p0", Mode.LOCAL, 0)
    assert lease.receipt.prefill_rule == "hosted_on_prefiller"
    here.finish(lease, 8_000)
    here.wait(5_000)
    here.observe("d0", kv_used_tokens=Tokens(80_000))
    here.observe("p0", prefill_tokens_total=Tokens(90_000))
    assert told(here, lease) is MoveReason.LOAD, "although it is the emptier engine"
    moved, _ = follow(here, lease, 8_000)
    assert (moved.decoder.engine_id, moved.prefiller) == ("d0", lease.decoder)


def test_incarnations_of_the_new_lease_are_todays() -> None:
    here = world()
    lease = idle_lease(here)
    here.observe("d1", incarnation=Incarnation("i2"))
    here.drain("d0")
    assert follow(here, lease)[0].decoder.incarnation == "i2"

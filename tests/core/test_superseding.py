"""Superseding: one new lease for a lease that failed, whoever asks and however often."""

import pytest

from conserve_sdk.core import (
    DropReason,
    EngineId,
    Granted,
    LeaseDropped,
    Mode,
    RefusalReason,
    Tokens,
    Waiting,
)
from tests.core.world import CAPACITY, World, answers, engines, full_world, granted, key, only, refused

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

"""A broker that starts again from its journal: what lives on, through which grace, and what it holds at once."""

from dataclasses import replace

import pytest

from conserve_sdk.core import (
    DropReason,
    EngineId,
    EngineRemoved,
    EngineState,
    Incarnation,
    Lease,
    LeaseDropped,
    LeaseId,
    LeaseVerdict,
    Ms,
)
from tests.core.world import World, engines, key, only, settings, spec


def restarted_world(now_ms: int = 1_000_000) -> tuple[World, list[Lease]]:
    before = World()
    leases = [before.grant(f"c{index}", 1_000) for index in range(3)]
    return World(fleet=[], now_ms=now_ms), leases


@pytest.mark.parametrize(("late", "left"), [(-1, 3), (0, 0)])
def test_nothing_expires_inside_the_grace(late: int, left: int) -> None:
    world, leases = restarted_world()
    assert world.recover(*leases, grace_ms=30_000) == []
    assert world.broker.next_deadline_ms() == 1_030_000
    world.at(1_030_000 + late)
    assert world.broker.lease_count() == left


def test_what_is_granted_parked_or_adopted_inside_the_grace_lives_through_it() -> None:
    world = World(settings=settings(ttl_ms=Ms(1_000), park_ttl_ms=Ms(100)))
    lost = replace(world.grant("c"), lease_id=LeaseId("lost"), key=key("lost"), expires_at_ms=Ms(900))
    world = World(settings=settings(ttl_ms=Ms(1_000), park_ttl_ms=Ms(100)), now_ms=10)
    world.recover(grace_ms=5_000)
    world.park(world.grant("parked"))
    assert world.grant("granted").expires_at_ms == 5_010, "its holder hears of it"
    world.readopt(lost)
    assert [lease.expires_at_ms for lease in world.broker.leases()] == [5_010, 5_010, 5_010]


def test_without_a_grace_what_is_over_ends_with_the_recovery_itself() -> None:
    _, leases = restarted_world()
    world = World(now_ms=max(lease.expires_at_ms for lease in leases))
    ended = [each.lease for each in world.recover(*leases, grace_ms=0) if isinstance(each, LeaseDropped)]
    assert (sorted(lease.lease_id for lease in ended), world.broker.lease_count()) == (["l1", "l2", "l3"], 0)


def test_a_life_longer_than_the_grace_is_kept() -> None:
    world, leases = restarted_world(now_ms=100)
    world.recover(*leases, grace_ms=1_000)
    assert world.broker.next_deadline_ms() == 60_000


def test_the_ledger_is_restored_before_the_engines_are_known() -> None:
    world, leases = restarted_world()
    world.recover(*leases, grace_ms=30_000)
    for each in engines():
        world.configure(each)
    assert [(view.engine_id, view.state, view.kv_leased_tokens, view.leases) for view in world.broker.engines()] == [
        ("d0", EngineState.UNKNOWN, 2_000, 2),
        ("d1", EngineState.UNKNOWN, 1_000, 1),
        ("p0", EngineState.UNKNOWN, 0, 0),
    ]
    assert world.renew(leases[0]).verdict is LeaseVerdict.OK
    assert world.observe("d0")[0].after is EngineState.READY  # type: ignore[union-attr]
    assert world.broker.lease_count() == 3
    dropped = only(LeaseDropped, world.observe("d1", incarnation=Incarnation("i2")))
    assert (dropped.lease.lease_id, dropped.reason) == (leases[1].lease_id, DropReason.ENGINE_RESTARTED)


def test_an_engine_that_is_silent_after_a_restart_is_not_gone_inside_the_grace() -> None:
    world, leases = restarted_world()
    world.recover(*leases, grace_ms=30_000)
    world.configure(spec("d0"))
    world.fail("d0")
    assert world.broker.next_deadline_ms() == 1_030_000
    world.at(1_029_999)
    assert world.broker.lease_count() == 3


def test_recovered_leases_of_an_engine_no_longer_configured_can_be_dropped() -> None:
    world, leases = restarted_world()
    world.recover(*leases, grace_ms=30_000)
    decisions = world.apply(EngineRemoved(now_ms=Ms(world.now_ms), engine_id=EngineId("d1")))
    assert decisions == [
        LeaseDropped(lease=replace(leases[1], expires_at_ms=Ms(1_030_000)), reason=DropReason.ENGINE_REMOVED)
    ]
    world.finish(leases[0], 1_100)
    assert world.broker.lease_count() == 2


def test_of_two_recovered_leases_of_one_key_the_higher_epoch_lives() -> None:
    world, leases = restarted_world()
    successor = replace(leases[0], lease_id=LeaseId("successor"), epoch=2)
    assert world.recover(leases[0], successor, grace_ms=30_000) == [
        LeaseDropped(lease=leases[0], reason=DropReason.SUPERSEDED)
    ]
    assert [lease.lease_id for lease in world.broker.leases()] == ["successor"]

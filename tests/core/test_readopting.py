"""A lease that comes back from its token: who gets it back, where, and until when."""

from dataclasses import replace

import pytest

from conserve_sdk.core import (
    DropReason,
    EngineId,
    EngineState,
    Granted,
    Incarnation,
    Lease,
    LeaseAnswered,
    LeaseDropped,
    LeaseId,
    LeaseStored,
    LeaseVerdict,
    Ms,
    RequestId,
    Waiting,
)
from tests.core.world import World, answer, answers, granted, key, only, settings, spec


def lost_lease(**changes: object) -> tuple[World, Lease]:
    """A broker that lost its state, and a lease it had granted."""
    lease = World().grant("c", 1_000, lease_id=LeaseId("lost"))
    return World(now_ms=100), replace(lease, **changes)  # type: ignore[arg-type]


def test_a_lost_lease_is_put_back_into_the_ledger() -> None:
    world, lease = lost_lease()
    assert world.readopt(lease) == [
        LeaseStored(lease=lease, fresh=True),
        LeaseAnswered(lease_id=lease.lease_id, verdict=LeaseVerdict.OK, lease=lease),
    ]
    assert world.view("d0").kv_leased_tokens == 1_000
    assert world.broker.counters.readopted == 1
    assert world.readopt(lease) == [LeaseAnswered(lease_id=lease.lease_id, verdict=LeaseVerdict.OK, lease=lease)], (
        "a second time changes nothing"
    )
    assert world.broker.counters.readopted == 1


@pytest.mark.parametrize(("expires_at_ms", "expected"), [(101, LeaseVerdict.OK), (100, LeaseVerdict.UNKNOWN)])
def test_an_expired_lease_is_not_put_back(expires_at_ms: int, expected: LeaseVerdict) -> None:
    world, lease = lost_lease(expires_at_ms=Ms(expires_at_ms))
    assert answer(world.readopt(lease)).verdict is expected


@pytest.mark.parametrize("end", ["release", "supersede", "expire", "restart"])
def test_what_ended_here_is_not_put_back(end: str) -> None:
    world = World()
    lease = world.grant("c")
    expected = LeaseVerdict.UNKNOWN
    if end == "release":
        world.release(lease)
    elif end == "supersede":
        world.release(granted(world.supersede(lease)).lease)
        expected = LeaseVerdict.SUPERSEDED
    elif end == "expire":
        world.at(60_000)
    else:
        world.observe("d0", incarnation=Incarnation("i2"))
        expected = LeaseVerdict.ENGINE_LOST
    # A token may outlive the lease's last known expiry by up to two TTLs.
    world.at(max(world.now_ms, 60_000) + 119_999)
    assert answer(world.readopt(replace(lease, expires_at_ms=Ms(10**9)))).verdict is expected
    assert world.broker.lease_count() == 0


def test_tombstones_are_forgotten_when_no_token_can_be_valid() -> None:
    world = World()
    lease = world.grant("c")
    world.at(60_000)
    world.at(60_000 + 120_000)
    assert answer(world.readopt(replace(lease, expires_at_ms=Ms(10**9)))).verdict is LeaseVerdict.OK


def test_tombstones_are_bounded_and_the_oldest_goes_first() -> None:
    world = World(settings=settings(leases_max=2))
    ended = [world.grant(f"c{index}") for index in range(2)]
    for lease in ended:
        world.release(lease)
    third = world.grant("c2")
    world.release(third)
    verdicts = [answer(world.readopt(lease)).verdict for lease in (*ended, third)]
    assert verdicts == [LeaseVerdict.OK, LeaseVerdict.UNKNOWN, LeaseVerdict.UNKNOWN]


@pytest.mark.parametrize(
    ("live_epoch", "expected"), [(1, LeaseVerdict.OK), (2, LeaseVerdict.SUPERSEDED), (3, LeaseVerdict.SUPERSEDED)]
)
def test_the_higher_epoch_of_a_key_lives(live_epoch: int, expected: LeaseVerdict) -> None:
    world, lease = lost_lease(epoch=2)
    rival = replace(lease, lease_id=LeaseId("rival"), epoch=live_epoch)
    world.readopt(rival)
    decisions = world.readopt(lease)
    assert answer(decisions).verdict is expected
    if expected is LeaseVerdict.OK:
        assert only(LeaseDropped, decisions) == LeaseDropped(lease=rival, reason=DropReason.SUPERSEDED)
        assert list(world.broker.leases()) == [lease]
    else:
        assert answer(decisions).successor == "rival"
        assert list(world.broker.leases()) == [rival]


def test_a_lease_comes_back_only_to_its_own_decoder() -> None:
    world, lease = lost_lease()
    elsewhere = replace(lease, decoder=replace(lease.decoder, engine_id=EngineId("gone")))
    restarted = replace(lease, decoder=replace(lease.decoder, incarnation=Incarnation("i0")))
    other_model = replace(lease, key=key("c", model="other"))
    for impossible in (elsewhere, restarted, other_model):
        assert answer(world.readopt(impossible)).verdict is LeaseVerdict.ENGINE_LOST
    assert world.broker.lease_count() == 0


def test_a_lease_comes_back_before_its_decoder_was_observed_but_not_after_it_is_gone() -> None:
    _, lease = lost_lease()
    world = World(fleet=[])
    world.configure(spec("d0"))
    assert answer(world.readopt(lease)).verdict is LeaseVerdict.OK
    world = World(fleet=[])
    world.configure(spec("d0"))
    world.fail("d0")
    world.at(15_000)
    assert world.view("d0").state is EngineState.GONE
    assert answer(world.readopt(lease)).verdict is LeaseVerdict.ENGINE_LOST


@pytest.mark.parametrize("bound", [{"leases_max": 1}, {"leases_per_tenant_max": 1}])
def test_re_adoption_respects_the_bounds(bound: dict[str, int]) -> None:
    _, lease = lost_lease(epoch=2)
    world = World(settings=settings(**bound))
    other = world.grant("other")
    assert answer(world.readopt(lease)).verdict is LeaseVerdict.UNKNOWN
    world.release(other)
    world.grant("c")
    assert answer(world.readopt(lease)).verdict is LeaseVerdict.OK, "it takes its rival's place"


def test_who_waits_for_a_key_gets_the_lease_that_comes_back() -> None:
    _, lease = lost_lease()
    world = World()
    for engine_id in ("d0", "d1"):
        world.drain(engine_id)
    only(Waiting, world.request("c", wait_ms=5_000))
    outcome = answers(world.readopt(lease))
    assert outcome == {RequestId("r1"): Granted(request_id=RequestId("r1"), lease=lease, reused=True)}

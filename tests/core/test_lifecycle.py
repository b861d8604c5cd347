"""A live lease: renewals, reports, park, release, expiry."""

from dataclasses import replace

import pytest

from conserve_sdk.core import (
    Activity,
    DropReason,
    LeaseAnswered,
    LeaseDropped,
    LeaseId,
    LeaseStored,
    LeaseVerdict,
    Mode,
    Ms,
    Tokens,
)
from tests.core.world import M, World, answer, engines, granted, only

# ---- renewing and expiry ----


@pytest.mark.parametrize(("late", "alive"), [(-1, True), (0, False), (1, False)])
def test_a_lease_dies_exactly_at_its_expiry(late: int, alive: bool) -> None:
    world = World()
    lease = world.grant("c")
    assert world.broker.next_deadline_ms() == lease.expires_at_ms == 60_000
    decisions = world.at(60_000 + late)
    assert (world.broker.lease(lease.lease_id) is not None) is alive
    dropped = [LeaseDropped(lease=lease, reason=DropReason.EXPIRED)]
    assert decisions == ([] if alive else dropped)
    assert world.broker.counters.expired == (0 if alive else 1)


@pytest.mark.parametrize(("late", "expected"), [(-1, LeaseVerdict.OK), (0, LeaseVerdict.UNKNOWN)])
def test_there_is_no_renewal_at_expiry(late: int, expected: LeaseVerdict) -> None:
    world = World()
    lease = world.grant("c")
    world.now_ms = 60_000 + late
    outcome = world.renew(lease)
    assert outcome.verdict is expected
    assert (outcome.lease is not None) is (expected is LeaseVerdict.OK)


def test_a_renewal_gives_a_full_ttl_and_is_not_journaled() -> None:
    world = World()
    lease = world.grant("c")
    world.now_ms = 20_000
    decisions = world.apply_renewal(lease)
    extended = replace(lease, expires_at_ms=Ms(80_000))
    assert decisions == [LeaseAnswered(lease_id=lease.lease_id, verdict=LeaseVerdict.OK, lease=extended)]
    assert world.broker.next_deadline_ms() == 80_000
    assert world.at(79_999) == []
    assert only(LeaseDropped, world.at(80_000)).lease == extended
    assert world.broker.counters.renewed == 1


def test_expired_leases_go_in_the_order_of_their_expiry() -> None:
    world = World()
    first, second = world.grant("a"), world.grant("b")
    world.now_ms = 10
    world.renew(first)
    dropped = [each.lease.lease_id for each in world.at(90_000) if isinstance(each, LeaseDropped)]
    assert dropped == [second.lease_id, first.lease_id]


def test_the_end_of_a_lease_clears_the_ledger() -> None:
    world = World()
    lease = world.grant("c", 1_000)
    assert (world.view("d0").kv_leased_tokens, world.view("d0").leases, world.view("d0").busy) == (1_000, 1, 1)
    assert world.view("p0").backlog_tokens == 1_000
    world.release(lease)
    assert (world.view("d0").kv_leased_tokens, world.view("d0").leases, world.view("d0").busy) == (0, 0, 0)
    assert world.view("p0").backlog_tokens == 0


# ---- reports ----


def test_a_finished_turn_makes_the_ledger_exact_and_the_lease_idle() -> None:
    world = World()
    lease = world.grant("c", 1_000)
    world.now_ms = 300
    decisions = world.finish(lease, 1_250, migrated=True)
    changed = answer(decisions).lease
    assert changed is not None
    assert changed == replace(
        lease,
        ledger_tokens=Tokens(1_250),
        activity=Activity.IDLE,
        activity_since_ms=Ms(300),
        turns=1,
        migrations=1,
        expires_at_ms=Ms(60_300),
    )
    assert decisions[0] == LeaseStored(lease=changed)
    assert (world.view("d0").kv_leased_tokens, world.view("d0").busy) == (1_250, 0)
    assert (world.view("p0").backlog_tokens, world.broker.counters.migrations) == (0, 1)


def test_a_turn_of_unknown_size_keeps_the_ledger() -> None:
    world = World()
    lease = world.grant("c", 1_000)
    world.finish(lease, 0, idle=False)
    kept = world.broker.lease(lease.lease_id)
    assert kept is not None
    assert (kept.ledger_tokens, kept.activity, kept.turns) == (1_000, Activity.BUSY, 1)


def test_a_lease_counts_one_migration_whatever_is_reported() -> None:
    world = World()
    lease = world.grant("c")
    for _ in range(3):
        world.finish(lease, 1_100, migrated=True)
    assert [each.migrations for each in world.broker.leases()] == [1]
    world.finish(lease, 1_100, migrated=False)
    assert [each.migrations for each in world.broker.leases()] == [1]
    assert world.broker.counters.migrations == 1


@pytest.mark.parametrize("already", [True, False])
def test_a_transfer_that_is_reported_after_the_lease_counts_once(already: bool) -> None:
    world = World()
    lease = world.grant("c")
    if already:
        world.finish(lease, 1_100, migrated=True)
    world.release(lease)
    for _ in range(2):
        assert answer(world.finish(lease, 1_100, migrated=True)).verdict is LeaseVerdict.UNKNOWN
    assert world.broker.counters.migrations == 1


def test_a_late_report_without_a_transfer_or_of_a_local_lease_counts_none() -> None:
    world = World(fleet=engines(prefillers=0))
    lease = world.grant("c")
    world.release(lease)
    world.finish(lease, 1_100, migrated=True)
    assert world.broker.counters.migrations == 0
    world = World()
    lease = world.grant("c")
    world.release(lease)
    world.finish(lease, 1_100, migrated=False)
    assert world.broker.counters.migrations == 0


def test_a_local_lease_never_counts_a_migration() -> None:
    world = World(fleet=engines(prefillers=0))
    lease = world.grant("c")
    assert lease.mode is Mode.LOCAL
    world.finish(lease, 1_100, migrated=True)
    assert (next(world.broker.leases()).migrations, world.broker.counters.migrations) == (0, 0)


def test_a_started_turn_makes_the_lease_busy_and_only_grows_the_ledger() -> None:
    world = World()
    lease = world.grant("c", 1_000)
    world.finish(lease, 1_100)
    world.now_ms = 400
    changed = answer(world.start(lease, 1_500)).lease
    assert changed is not None
    assert (changed.activity, changed.activity_since_ms, changed.ledger_tokens) == (Activity.BUSY, 400, 1_500)
    assert changed.expires_at_ms == 60_400
    world.now_ms = 500
    decisions = world.start(lease, 900)
    assert [type(each).__name__ for each in decisions] == ["LeaseAnswered"], "nothing to journal"
    assert answer(decisions).lease == replace(changed, expires_at_ms=Ms(60_500))
    grown = answer(world.start(lease, 1_501)).lease
    assert grown is not None
    assert (grown.ledger_tokens, grown.activity_since_ms) == (1_501, 400)


@pytest.mark.parametrize("event", ["start", "finish", "park", "release"])
def test_nothing_can_be_said_about_a_lease_that_is_not_live(event: str) -> None:
    world = World()
    lease = world.grant("c")
    world.release(lease)
    decisions = getattr(world, event)(lease)
    assert decisions == [LeaseAnswered(lease_id=lease.lease_id, verdict=LeaseVerdict.UNKNOWN)]


# ---- park and release ----


def test_parking_shortens_the_life() -> None:
    world = World()
    lease = world.grant("c")
    world.now_ms = 1_000
    decisions = world.park(lease)
    parked = answer(decisions).lease
    assert parked is not None
    assert (parked.activity, parked.activity_since_ms, parked.expires_at_ms) == (Activity.PARKED, 1_000, 11_000)
    assert decisions[0] == LeaseStored(lease=parked)
    assert world.broker.next_deadline_ms() == 11_000
    assert (world.view("d0").busy, world.broker.counters.parked) == (0, 1)


def test_a_parked_lease_is_not_kept_by_renewals_nor_by_parking_again() -> None:
    world = World()
    lease = world.grant("c")
    world.park(lease)
    world.now_ms = 5_000
    assert world.renew(lease).verdict is LeaseVerdict.OK
    assert [type(each) for each in world.park(lease)] == [LeaseAnswered], "nothing changed, nothing to write"
    assert world.broker.next_deadline_ms() == 10_000


def test_parking_never_lengthens_a_life() -> None:
    world = World()
    lease = world.grant("c")
    world.now_ms = 55_000
    parked = answer(world.park(lease)).lease
    assert parked is not None
    assert (parked.activity, parked.expires_at_ms) == (Activity.PARKED, 60_000)


def test_a_turn_brings_a_parked_lease_back() -> None:
    world = World()
    lease = world.grant("c")
    world.park(lease)
    world.now_ms = 5_000
    back = answer(world.start(lease)).lease
    assert back is not None
    assert (back.activity, back.expires_at_ms) == (Activity.BUSY, 65_000)


def test_release_ends_the_lease() -> None:
    world = World()
    lease = world.grant("c")
    decisions = world.release(lease)
    assert decisions == [
        LeaseDropped(lease=lease, reason=DropReason.RELEASED),
        LeaseAnswered(lease_id=lease.lease_id, verdict=LeaseVerdict.OK, lease=lease),
    ]
    assert world.broker.counters.released == 1
    assert world.grant("c").epoch == 1


def test_a_superseded_lease_names_its_successor() -> None:
    world = World()
    old = world.grant("c")
    new = granted(world.supersede(old)).lease
    assert world.renew(old) == LeaseAnswered(
        lease_id=old.lease_id, verdict=LeaseVerdict.SUPERSEDED, successor=new.lease_id
    )
    world.release(new)
    assert world.renew(old) == LeaseAnswered(lease_id=old.lease_id, verdict=LeaseVerdict.SUPERSEDED)


def test_a_lease_never_heard_of_is_unknown() -> None:
    world = World()
    lease = replace(world.grant("c"), lease_id=LeaseId("other"))
    assert world.renew(lease).verdict is LeaseVerdict.UNKNOWN


# ---- the broker itself ----


def test_time_never_goes_backwards() -> None:
    world = World(now_ms=10)
    with pytest.raises(AssertionError, match="backwards"):
        world.at(9)


def test_counters_are_a_copy() -> None:
    world = World()
    counters = world.broker.counters
    world.grant("c")
    assert (counters.granted, world.broker.counters.granted) == (0, 1)
    assert counters.refused is not world.broker.counters.refused


def test_the_ratio_of_a_model_can_be_read() -> None:
    assert World().broker.tokens_per_byte_ppm(M) == 250_000

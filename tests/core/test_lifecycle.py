"""A live lease: renewals, reports, park, release, expiry; and leases that come back from a token or the journal."""

from dataclasses import replace

import pytest

from conserve_sdk.core import (
    Activity,
    DropReason,
    EngineId,
    EngineRemoved,
    EngineState,
    Granted,
    Incarnation,
    Lease,
    LeaseAnswered,
    LeaseDropped,
    LeaseId,
    LeaseStored,
    LeaseVerdict,
    Mode,
    Ms,
    Recovered,
    RequestId,
    Tokens,
    Waiting,
)
from tests.core.world import M, World, answer, answers, engines, granted, key, only, settings, spec


def verdict(decisions: list[object]) -> LeaseVerdict:
    return answer(decisions).verdict  # type: ignore[arg-type]


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


# ---- re-adoption ----


def lost_lease(**changes: object) -> tuple[World, Lease]:
    """A broker that lost its state, and a lease it had granted."""
    lease = World().grant("c", 1_000, lease_id=LeaseId("lost"))
    return World(now_ms=100), replace(lease, **changes)  # type: ignore[arg-type]


def test_a_lost_lease_is_put_back_into_the_ledger() -> None:
    world, lease = lost_lease()
    assert world.readopt(lease) == [
        LeaseStored(lease=lease),
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


# ---- recovery ----


def recovered(world: World, *leases: Lease, grace_ms: int = 30_000) -> list[object]:
    return list(world.apply(Recovered(now_ms=Ms(world.now_ms), leases=leases, grace_ms=Ms(grace_ms))))


def restarted_world(now_ms: int = 1_000_000) -> tuple[World, list[Lease]]:
    before = World()
    leases = [before.grant(f"c{index}", 1_000) for index in range(3)]
    return World(fleet=[], now_ms=now_ms), leases


@pytest.mark.parametrize(("late", "left"), [(-1, 3), (0, 0)])
def test_nothing_expires_inside_the_grace(late: int, left: int) -> None:
    world, leases = restarted_world()
    assert recovered(world, *leases) == []
    assert world.broker.next_deadline_ms() == 1_030_000
    world.at(1_030_000 + late)
    assert world.broker.lease_count() == left


def test_what_is_granted_parked_or_adopted_inside_the_grace_lives_through_it() -> None:
    world = World(settings=settings(ttl_ms=Ms(1_000), park_ttl_ms=Ms(100)))
    lost = replace(world.grant("c"), lease_id=LeaseId("lost"), key=key("lost"), expires_at_ms=Ms(900))
    world = World(settings=settings(ttl_ms=Ms(1_000), park_ttl_ms=Ms(100)), now_ms=10)
    recovered(world, grace_ms=5_000)
    world.park(world.grant("parked"))
    assert world.grant("granted").expires_at_ms == 5_010, "its holder hears of it"
    world.readopt(lost)
    assert [lease.expires_at_ms for lease in world.broker.leases()] == [5_010, 5_010, 5_010]


def test_without_a_grace_what_is_over_ends_with_the_recovery_itself() -> None:
    _, leases = restarted_world()
    world = World(now_ms=max(lease.expires_at_ms for lease in leases))
    ended = [each.lease for each in recovered(world, *leases, grace_ms=0) if isinstance(each, LeaseDropped)]
    assert (sorted(lease.lease_id for lease in ended), world.broker.lease_count()) == (["l1", "l2", "l3"], 0)


def test_a_life_longer_than_the_grace_is_kept() -> None:
    world, leases = restarted_world(now_ms=100)
    recovered(world, *leases, grace_ms=1_000)
    assert world.broker.next_deadline_ms() == 60_000


def test_the_ledger_is_restored_before_the_engines_are_known() -> None:
    world, leases = restarted_world()
    recovered(world, *leases)
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
    recovered(world, *leases)
    world.configure(spec("d0"))
    world.fail("d0")
    assert world.broker.next_deadline_ms() == 1_030_000
    world.at(1_029_999)
    assert world.broker.lease_count() == 3


def test_recovered_leases_of_an_engine_no_longer_configured_can_be_dropped() -> None:
    world, leases = restarted_world()
    recovered(world, *leases)
    decisions = world.apply(EngineRemoved(now_ms=Ms(world.now_ms), engine_id=EngineId("d1")))
    assert decisions == [
        LeaseDropped(lease=replace(leases[1], expires_at_ms=Ms(1_030_000)), reason=DropReason.ENGINE_REMOVED)
    ]
    world.finish(leases[0], 1_100)
    assert world.broker.lease_count() == 2


def test_of_two_recovered_leases_of_one_key_the_higher_epoch_lives() -> None:
    world, leases = restarted_world()
    successor = replace(leases[0], lease_id=LeaseId("successor"), epoch=2)
    assert recovered(world, leases[0], successor) == [LeaseDropped(lease=leases[0], reason=DropReason.SUPERSEDED)]
    assert [lease.lease_id for lease in world.broker.leases()] == ["successor"]


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

"""What those who watch can read of the core: totals, activities, who waits, leases from a place on."""

from conserve_sdk.core import DEFAULT, PAPER, Activity, BrokerSettings, SupersedeCause, Tokens
from tests.core.world import World, granted, spec

ROOM = 20_000


def two_small_decoders() -> World:
    return World(fleet=[spec(name, kv_capacity_tokens=Tokens(ROOM)) for name in ("d0", "d1")])


def test_totals_of_waits_and_failovers() -> None:
    world = two_small_decoders()
    first = world.grant("a", 100)
    world.supersede(first)
    assert (world.broker.counters.failed_over, world.broker.counters.queued) == (1, 0)
    world.grant("b", ROOM - 2_000)
    world.grant("c", ROOM - 2_000)
    world.request("w", 5_000, wait_ms=1_000)
    assert world.broker.counters.queued == 1
    world.wait(1_000)
    assert world.broker.counters.queued == 1, "a total: whoever waited is counted however it ended"


def test_ten_failures_of_one_lease_are_one_failover() -> None:
    world = World()
    lease = world.grant("a")
    for _ in range(10):
        world.supersede(lease)
    assert world.broker.counters.failed_over == 1


def test_a_failover_that_waits_counts_when_it_is_granted() -> None:
    world = two_small_decoders()
    lease = world.grant("a", 1_000)
    other = world.grant("b", ROOM - 500)
    world.supersede(lease, failed_engine_id=lease.decoder.engine_id, wait_ms=5_000)
    assert world.broker.counters.failed_over == 0
    world.release(other)
    assert world.broker.counters.failed_over == 1


def test_moves_and_appends_are_no_failovers() -> None:
    world = World(settings=BrokerSettings(placement=DEFAULT))
    lease = world.grant("a")
    for cause in (SupersedeCause.RE_LEASE, SupersedeCause.APPEND):
        world.supersede(lease, cause=cause)
    assert world.broker.counters.failed_over == 0


def test_a_spill_over_is_a_score_that_keeps_the_prompt_on_its_decoder() -> None:
    world = World(settings=BrokerSettings(placement=DEFAULT))
    lease = world.grant("a", 4_000)
    assert (lease.prefiller, lease.receipt.prefill_rule) == (None, "score")
    assert world.broker.counters.spilled == 1
    world.grant("tiny", 100)
    assert world.broker.counters.spilled == 1, "too short to be weighed"
    paper = World(settings=BrokerSettings(placement=PAPER))
    paper.grant("a", 4_000)
    assert paper.broker.counters.spilled == 0


def test_activities_follow_every_lease() -> None:
    world = World()
    leases = [world.grant(name) for name in "abcd"]

    def counted() -> tuple[int, ...]:
        activities = world.broker.activities()
        assert sum(activities.values()) == world.broker.lease_count()
        return tuple(activities[each] for each in Activity)

    assert counted() == (4, 0, 0)
    world.finish(leases[0], 500)
    world.park(leases[1])
    assert counted() == (2, 1, 1)
    world.start(leases[0])
    world.release(leases[2])
    assert counted() == (2, 0, 1)
    world.wait(100_000)
    assert counted() == (0, 0, 0)
    again = World()
    again.recover(*leases)
    assert again.broker.activities()[Activity.BUSY] == 4


def test_who_waits_in_the_order_of_arrival() -> None:
    world = two_small_decoders()
    world.grant("a", ROOM - 100)
    world.grant("b", ROOM - 100)
    for number, tenant in enumerate(("t", "u", "t")):
        world.wait(10)
        world.request(f"w{number}", 5_000 + number, tenant=tenant, wait_ms=1_000)
    waiting = world.broker.waiting_requests(most=2)
    assert [(each.key.conversation_id, each.key.tenant, each.need_tokens) for each in waiting] == [
        ("w0", "t", 5_000),
        ("w1", "u", 5_001),
    ]
    assert [(each.asked_at_ms, each.deadline_at_ms) for each in waiting] == [(10, 1_010), (20, 1_020)]
    assert len(world.broker.waiting_requests(most=9)) == 3


def test_leases_from_a_place_on() -> None:
    world = World()
    leases = [granted(world.request(name)).lease for name in "abc"]
    assert [lease.lease_id for lease in world.broker.leases_from(1)] == [lease.lease_id for lease in leases[1:]]
    assert list(world.broker.leases_from(9)) == []
    assert world.broker.leases_ended() == 0
    world.release(leases[0])
    assert world.broker.leases_ended() == 1
    assert next(world.broker.leases_from(0)).lease_id == leases[1].lease_id

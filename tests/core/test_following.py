"""A standby that followed the leader's rows, compared with a broker that reads them all at once."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk.core import (
    Activity,
    Broker,
    BrokerSettings,
    DropReason,
    EngineId,
    JournalFollowed,
    Lease,
    LeaseDropped,
    LeaseId,
    Ms,
    Recovered,
    Tokens,
)
from tests.core.world import World, key

TEMPLATE = World().grant("template")
SETTINGS = BrokerSettings()

leases = st.builds(
    lambda number, tokens, activity, expires_at_ms: replace(
        TEMPLATE,
        lease_id=LeaseId(f"l{number}"),
        key=key(f"c{number % 2}"),
        epoch=1 + number // 2,
        ledger_tokens=Tokens(tokens),
        decoder=replace(TEMPLATE.decoder, engine_id=EngineId(f"d{number % 3 % 2}")),
        activity=activity,
        activity_since_ms=Ms(0),
        expires_at_ms=Ms(expires_at_ms),
    ),
    st.integers(0, 5),
    st.integers(0, 9),
    st.sampled_from(Activity),
    st.integers(1, 9_000),
)
changes = st.lists(
    st.tuples(st.lists(leases, max_size=3, unique_by=lambda lease: lease.lease_id), st.sets(st.integers(0, 5)))
)


def followed(broker: Broker, now_ms: int, *stored: Lease, dropped: tuple[LeaseId, ...] = ()) -> None:
    assert broker.apply(JournalFollowed(now_ms=Ms(now_ms), stored=stored, dropped=dropped)) == []


def recovered(broker: Broker, now_ms: int, *leases: Lease, grace_ms: int = 1_000) -> list[LeaseId]:
    """The rows that it drops."""
    decisions = broker.apply(Recovered(now_ms=Ms(now_ms), leases=leases, grace_ms=Ms(grace_ms)))
    assert all(isinstance(each, LeaseDropped) and each.reason is DropReason.SUPERSEDED for each in decisions)
    return [each.lease.lease_id for each in decisions if isinstance(each, LeaseDropped)]


def by_id(broker: Broker) -> dict[LeaseId, Lease]:
    return {lease.lease_id: lease for lease in broker.leases()}


@given(changes, st.integers(0, 5_000))
def test_a_standby_begins_where_a_restart_would(groups: list[tuple[list[Lease], set[int]]], now_ms: int) -> None:
    standby, rows = Broker(SETTINGS), dict[LeaseId, Lease]()
    for at_ms, (stored, numbers) in enumerate(groups):
        dropped = tuple(LeaseId(f"l{number}") for number in sorted(numbers))
        followed(standby, at_ms, *stored, dropped=dropped)
        for lease_id in dropped:
            rows.pop(lease_id, None)
        rows |= {lease.lease_id: lease for lease in stored}
    now_ms += len(groups)
    restarted = Broker(SETTINGS)
    assert sorted(recovered(standby, now_ms)) == sorted(recovered(restarted, now_ms, *rows.values()))
    assert {lease.lease_id: lease for lease in standby.leases()} == {
        lease.lease_id: lease for lease in restarted.leases()
    }
    assert standby.next_deadline_ms() == restarted.next_deadline_ms()
    assert standby.lease_engines() == restarted.lease_engines()
    for engine_id in ("d0", "d1"):
        accounts = [broker._state.occupancy.account(EngineId(engine_id)) for broker in (standby, restarted)]
        assert accounts[0] == accounts[1]


def test_nothing_expires_while_a_standby_follows() -> None:
    standby = Broker(SETTINGS)
    followed(standby, 0, replace(TEMPLATE, expires_at_ms=Ms(10)))
    followed(standby, 1_000_000)
    assert standby.lease_count() == 1
    assert recovered(standby, 1_000_000, grace_ms=500) == []
    (lease,) = standby.leases()
    assert lease.expires_at_ms == standby.next_deadline_ms() == 1_000_500
    assert (standby.now_ms, standby.settings) == (1_000_000, SETTINGS)


def test_a_predecessor_that_is_still_there_goes_when_the_standby_leads() -> None:
    standby = Broker(SETTINGS)
    successor = replace(TEMPLATE, lease_id=LeaseId("l9"), epoch=2, supersedes=TEMPLATE.lease_id)
    followed(standby, 0, TEMPLATE)
    followed(standby, 0, successor)
    assert [lease.lease_id for lease in standby.leases()] == ["l9"]
    assert recovered(standby, 1) == [TEMPLATE.lease_id]


def test_a_successor_that_ends_leaves_the_predecessor() -> None:
    standby = Broker(SETTINGS)
    successor = replace(TEMPLATE, lease_id=LeaseId("l9"), epoch=2)
    followed(standby, 0, successor)
    followed(standby, 0, TEMPLATE)
    followed(standby, 0, dropped=(LeaseId("l9"), LeaseId("never seen")))
    assert recovered(standby, 1) == []
    assert [lease.lease_id for lease in standby.leases()] == [TEMPLATE.lease_id]

"""The lease table and its tombstones, compared with plain dictionaries."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from conserve_sdk.core import Activity, DropReason, EngineId, Incarnation, Lease, LeaseId, Ms, TenantId, Tokens
from conserve_sdk.core.lease_table import LeaseTable, Tombstones
from conserve_sdk.core.occupancy import Account, Occupancy
from tests.core.world import World, key

TEMPLATE = World().grant("template")


def lease(
    name: int, *, expires_at_ms: int = 100, decoder: str = "d0", tenant: str = "t", tokens: int = 10, hold_ms: int = 0
) -> Lease:
    return replace(
        TEMPLATE,
        lease_id=LeaseId(f"l{name}"),
        key=key(f"c{name}", tenant=tenant),
        expires_at_ms=Ms(expires_at_ms),
        decoder=replace(TEMPLATE.decoder, engine_id=EngineId(decoder)),
        ledger_tokens=Tokens(tokens),
        hold_ms=Ms(hold_ms),
    )


class LeaseTableMachine(RuleBasedStateMachine):
    """Leases come, move their expiry to and fro, and go."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.ledger = Occupancy()
        self.model: dict[LeaseId, Lease] = {}
        self.now_ms = 0
        self.serial = 0

    @rule(
        life_ms=st.integers(1, 50),
        decoder=st.sampled_from(["d0", "d1"]),
        tenant=st.sampled_from(["t", "u"]),
        tokens=st.integers(0, 9),
        hold_ms=st.sampled_from([0, 5]),
    )
    def add(self, life_ms: int, decoder: str, tenant: str, tokens: int, hold_ms: int) -> None:
        self.serial += 1
        expires_at_ms = self.now_ms + life_ms
        added = lease(
            self.serial, expires_at_ms=expires_at_ms, decoder=decoder, tenant=tenant, tokens=tokens, hold_ms=hold_ms
        )
        self.model[added.lease_id] = added
        self.table.add(added)
        self.ledger.add(added)

    @precondition(lambda self: self.model)
    @rule(pick=st.integers(0, 99), life_ms=st.integers(1, 50), tokens=st.integers(0, 9), busy=st.booleans())
    def change(self, pick: int, life_ms: int, tokens: int, busy: bool) -> None:
        before = self._pick(pick)
        after = replace(
            before,
            expires_at_ms=Ms(self.now_ms + life_ms),
            ledger_tokens=Tokens(tokens),
            activity=Activity.BUSY if busy else Activity.IDLE,
        )
        self.model[after.lease_id] = after
        self.table.replace(after)
        self.ledger.remove(before)
        self.ledger.add(after)

    @precondition(lambda self: self.model)
    @rule(pick=st.integers(0, 99))
    def remove(self, pick: int) -> None:
        gone = self._pick(pick)
        del self.model[gone.lease_id]
        assert self.table.remove(gone.lease_id) == gone
        self.ledger.remove(gone)

    @precondition(lambda self: self.model)
    @rule(late_ms=st.sampled_from([-1, 0, 1]))
    def land_on_the_next_expiry(self, late_ms: int) -> None:
        first_ms = min(each.expires_at_ms for each in self.model.values())
        assert self.table.next_expiry_ms() == first_ms
        self.now_ms = max(self.now_ms, first_ms + late_ms)
        dead = sorted((each.expires_at_ms, each.lease_id) for each in self.model.values())
        expected = [lease_id for at_ms, lease_id in dead if at_ms <= self.now_ms]
        found = []
        while (expired := self.table.first_expired(Ms(self.now_ms))) is not None:
            found.append(expired.lease_id)
            self.ledger.remove(self.table.remove(expired.lease_id))
            del self.model[expired.lease_id]
        assert found == expected

    @invariant()
    def the_table_is_the_model(self) -> None:
        assert list(self.table) == list(self.model.values())
        assert len(self.table) == len(self.model)
        for each in self.model.values():
            assert self.table.get(each.lease_id) == self.table.live_of(each.key) == each
        for engine_id in (EngineId("d0"), EngineId("d1")):
            hosted = [each for each in self.model.values() if each.decoder.engine_id == engine_id]
            assert sorted(self.table.of_decoder(engine_id), key=lambda each: each.lease_id) == sorted(
                hosted, key=lambda each: each.lease_id
            )
            assert self.ledger.account(engine_id) == Account(
                leased_tokens=sum(each.ledger_tokens for each in hosted),
                holding_tokens=sum(each.ledger_tokens for each in hosted if each.hold_ms),
                leases=len(hosted),
                busy=sum(each.activity is Activity.BUSY for each in hosted),
            )
        for tenant in (TenantId("t"), TenantId("u")):
            owned = [each for each in self.model.values() if each.key.tenant == tenant]
            assert self.table.count_of(tenant) == len(owned)
            assert self.ledger.held_by(tenant) == sum(each.ledger_tokens for each in owned)
        hosts = {each.decoder.engine_id for each in self.model.values()}
        assert self.table.decoders() == tuple(sorted(hosts))
        assert self.ledger._accounts.keys() == hosts, "no account outlives its leases"
        assert self.table.removals == self.serial - len(self.model)
        assert self.table.next_expiry_ms() == min((each.expires_at_ms for each in self.model.values()), default=None)

    def _pick(self, pick: int) -> Lease:
        return list(self.model.values())[pick % len(self.model)]


LeaseTableMachine.TestCase.settings = settings(
    max_examples=50, stateful_step_count=40, phases=(Phase.explicit, Phase.generate)
)
TestLeaseTable = LeaseTableMachine.TestCase


def test_what_is_not_there_is_not_found() -> None:
    table = LeaseTable()
    assert (table.get(LeaseId("l1")), table.live_of(key("c")), table.next_expiry_ms()) == (None, None, None)
    assert (table.of_decoder(EngineId("d0")), table.count_of(TenantId("t"))) == ((), 0)
    assert table.first_expired(Ms(10**9)) is None


def test_renewals_leave_one_entry_to_look_at() -> None:
    table = LeaseTable()
    table.add(lease(1, expires_at_ms=100))
    for expires_at_ms in range(101, 200):
        table.replace(lease(1, expires_at_ms=expires_at_ms))
    assert len(table._heap) == 1
    assert table.next_expiry_ms() == 199


@pytest.mark.parametrize("change", ["key", "epoch", "decoder", "prefiller"])
def test_identity_and_engines_of_a_lease_never_change(change: str) -> None:
    table = LeaseTable()
    before = lease(1)
    table.add(before)
    other = replace(before.decoder, incarnation=Incarnation("i2"))
    values = {"key": key("x"), "epoch": 2, "decoder": other, "prefiller": other}
    with pytest.raises(AssertionError, match="never change"):
        table.replace(replace(before, **{change: values[change]}))  # type: ignore[arg-type]


def test_a_second_live_lease_of_a_key_is_an_error_of_the_caller() -> None:
    table = LeaseTable()
    table.add(lease(1))
    with pytest.raises(AssertionError, match="already live"):
        table.add(lease(1))
    with pytest.raises(AssertionError, match="already has a live lease"):
        table.add(replace(lease(1), lease_id=LeaseId("l2")))


def test_a_ledger_that_would_go_negative_is_an_error_of_the_caller() -> None:
    ledger = Occupancy()
    ledger.add(lease(1, tokens=10))
    with pytest.raises(AssertionError, match="negative ledger"):
        ledger.remove(lease(1, tokens=11))
    ledger = Occupancy()
    ledger.add(lease(1, tokens=10))
    with pytest.raises(AssertionError, match="without leases"):
        ledger.remove(lease(1, tokens=9))


def test_tombstones_keep_the_youngest() -> None:
    tombstones = Tombstones(entries_max=2)
    for name in (1, 2, 3):
        tombstones.bury(lease(name), DropReason.RELEASED, keep_until_ms=Ms(50))
    assert tombstones.get(LeaseId("l1")) is None
    assert tombstones.get(LeaseId("l3")) == (DropReason.RELEASED, key("c3"))
    assert len(tombstones) == 2


@pytest.mark.parametrize(("now_ms", "left"), [(49, 2), (50, 1), (60, 0)])
def test_tombstones_end_with_the_last_valid_token(now_ms: int, left: int) -> None:
    tombstones = Tombstones(entries_max=9)
    tombstones.bury(lease(1), DropReason.RELEASED, keep_until_ms=Ms(50))
    tombstones.bury(lease(2), DropReason.EXPIRED, keep_until_ms=Ms(60))
    tombstones.prune(Ms(now_ms))
    assert len(tombstones) == left


def test_a_late_move_is_news_once_while_the_tombstone_stands() -> None:
    tombstones = Tombstones(entries_max=2)
    for name in (1, 2, 3):
        tombstones.bury(lease(name), DropReason.SUPERSEDED, keep_until_ms=Ms(50 if name == 2 else 60))
    assert not tombstones.take_late_move(LeaseId("l1"))
    assert [tombstones.take_late_move(LeaseId("l3")) for _ in range(2)] == [True, False]
    tombstones.prune(Ms(50))
    assert not tombstones.take_late_move(LeaseId("l2"))

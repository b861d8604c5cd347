"""Engines: states, incarnations, misfits, and what becomes of the leases on them."""

from dataclasses import replace
from typing import Any

import pytest

from conserve_sdk.core import (
    PAPER,
    BrokerSettings,
    Decision,
    DropReason,
    EngineId,
    EngineRemoved,
    EngineState,
    EngineStateChanged,
    EngineView,
    Incarnation,
    LeaseDropped,
    LeaseVerdict,
    ModelName,
    Ms,
    Ppm,
    Role,
    Tokens,
    TransferGroup,
)
from tests.core.world import M, World, engines, only, refused, spec


def states(decisions: list[Decision]) -> list[tuple[str, EngineState, EngineState]]:
    return [(each.engine_id, each.before, each.after) for each in decisions if isinstance(each, EngineStateChanged)]


def state(world: World, engine_id: str) -> EngineState:
    return world.view(engine_id).state


# ---- unknown, ready, draining ----


def test_an_engine_is_unknown_until_it_is_observed() -> None:
    world = World(fleet=[])
    assert world.configure(spec("d0")) == []
    assert world.view("d0") == EngineView(
        spec=spec("d0"),
        state=EngineState.UNKNOWN,
        detail="not observed yet",
        rate_tokens_per_s=10_000,
        prefill_share_ppm=Ppm(0),
    )
    assert states(world.observe("d0")) == [("d0", EngineState.UNKNOWN, EngineState.READY)]
    assert (world.view("d0").incarnation, world.view("d0").observed_at_ms, world.view("d0").detail) == ("i1", 0, "")


def test_a_view_shows_what_was_configured_observed_and_leased() -> None:
    world = World(fleet=[spec("d0", kv_capacity_tokens=Tokens(50_000), max_model_len_tokens=Tokens(9_000))])
    world.observe("d0", kv_used_tokens=Tokens(7), running=2, waiting=3)
    world.grant("c", 1_000)
    view = world.view("d0")
    assert (view.kv_capacity_tokens, view.kv_used_tokens, view.kv_leased_tokens) == (50_000, 7, 1_000)
    assert (view.running, view.waiting, view.leases, view.busy) == (2, 3, 1, 1)
    assert (view.block_size_tokens, view.max_model_len_tokens) == (16, 9_000)
    assert (view.backlog_tokens, view.rate_tokens_per_s) == (1_000, 10_000)


def test_engines_are_listed_by_id() -> None:
    world = World(fleet=[spec("b"), spec("c"), spec("a")])
    assert [view.engine_id for view in world.broker.engines()] == ["a", "b", "c"]


def test_draining_keeps_leases_and_gets_none() -> None:
    world = World(fleet=engines(decoders=1))
    lease = world.grant("c")
    assert states(world.drain("d0")) == [("d0", EngineState.READY, EngineState.DRAINING)]
    assert world.view("d0").draining
    assert world.renew(lease).verdict is LeaseVerdict.OK
    assert "d0 draining" in refused(world.request("d")).detail
    assert world.drain("d0") == [], "nothing changed"
    assert states(world.drain("d0", draining=False)) == [("d0", EngineState.DRAINING, EngineState.READY)]


def test_draining_survives_a_new_configuration() -> None:
    world = World()
    world.drain("d0")
    assert world.configure(replace(spec("d0"), tier="big")) == []
    assert state(world, "d0") is EngineState.DRAINING
    assert world.configure(spec("d1"), draining=True) != []
    assert state(world, "d1") is EngineState.DRAINING


def test_an_engine_can_be_added_draining() -> None:
    world = World(fleet=[])
    world.configure(spec("d0"), draining=True)
    assert states(world.observe("d0")) == [("d0", EngineState.UNKNOWN, EngineState.DRAINING)]


@pytest.mark.parametrize("changes", [{"url": "http://elsewhere"}, {"model": ModelName("n")}])
def test_another_url_or_model_forgets_what_was_observed(changes: dict[str, Any]) -> None:
    world = World(fleet=engines(decoders=1))
    lease = world.grant("c")
    world.fail("d0")
    decisions = world.configure(replace(spec("d0"), **changes))
    assert states(decisions) == [("d0", EngineState.READY, EngineState.UNKNOWN)]
    assert world.view("d0").incarnation is None
    assert world.broker.lease_count() == 1, "perhaps it is the same engine"
    models = (world.view("d0").spec.model,)
    dropped = only(LeaseDropped, world.observe("d0", incarnation=Incarnation("i2"), models=models))
    assert dropped == LeaseDropped(lease=lease, reason=DropReason.ENGINE_RESTARTED)


def test_the_same_configuration_changes_nothing() -> None:
    world = World()
    world.configure(spec("e0"))
    before = world.broker.engines()
    assert world.configure(spec("d0")) == world.configure(spec("e0")) == []
    assert world.broker.engines() == before


def test_removing_an_engine_drops_its_leases() -> None:
    world = World(fleet=engines(decoders=1))
    lease = world.grant("c")
    decisions = world.apply(EngineRemoved(now_ms=Ms(0), engine_id=EngineId("d0")))
    assert only(LeaseDropped, decisions) == LeaseDropped(lease=lease, reason=DropReason.ENGINE_REMOVED)
    assert states(decisions) == [("d0", EngineState.READY, EngineState.GONE)]
    assert [view.engine_id for view in world.broker.engines()] == ["p0"]
    assert world.renew(lease).verdict is LeaseVerdict.ENGINE_LOST


def test_removing_a_failing_engine_removes_its_deadlines() -> None:
    world = World()
    world.fail("d0")
    assert world.broker.next_deadline_ms() == 3_000
    world.apply(EngineRemoved(now_ms=Ms(0), engine_id=EngineId("d0")))
    assert world.broker.next_deadline_ms() is None


def test_events_of_engines_that_are_not_configured_mean_nothing() -> None:
    world = World(fleet=[])
    assert world.observe("x") == world.fail("x") == world.drain("x") == world.blame("x") == []
    assert world.apply(EngineRemoved(now_ms=Ms(0), engine_id=EngineId("x"))) == []


def test_a_lease_whose_prefiller_was_removed_ends_like_any_other() -> None:
    world = World()
    lease = world.grant("c")
    world.apply(EngineRemoved(now_ms=Ms(0), engine_id=EngineId("p0")))
    world.finish(lease, 1_100, prefill_engine_id=EngineId("p0"), prompt_tokens=Tokens(1_000), prefill_ms=Ms(10))
    world.release(lease)
    assert world.broker.lease_count() == 0


# ---- misfits ----


def test_an_engine_that_serves_another_model_is_a_misfit() -> None:
    world = World(fleet=engines(decoders=1))
    decisions = world.observe("d0", models=(ModelName("x"), ModelName("y")))
    assert states(decisions) == [("d0", EngineState.READY, EngineState.MISFIT)]
    assert "serves x, y, is configured for m" in world.view("d0").detail
    assert "d0 misfit" in refused(world.request("c")).detail
    world.observe("d0", models=())
    assert "no model" in world.view("d0").detail
    assert states(world.observe("d0", models=(ModelName("x"), M))) == [("d0", EngineState.MISFIT, EngineState.READY)]


def test_an_engine_with_another_block_size_than_configured_is_a_misfit() -> None:
    world = World(fleet=[])
    world.configure(spec("d0", block_size_tokens=Tokens(32)))
    assert world.view("d0").block_size_tokens == 32
    world.observe("d0")
    assert state(world, "d0") is EngineState.MISFIT
    assert "block size 16, configured 32" in world.view("d0").detail
    assert states(world.configure(spec("d0", block_size_tokens=Tokens(16)))) == [
        ("d0", EngineState.MISFIT, EngineState.READY)
    ]


def test_of_two_block_sizes_in_a_transfer_group_the_later_is_a_misfit() -> None:
    world = World(fleet=[spec("d0"), spec("d1")])
    world.configure(spec("p0", Role.PREFILLER))
    world.observe("p0", block_size_tokens=Tokens(32))
    assert state(world, "p0") is EngineState.MISFIT
    assert "d0 of transfer group 'g' has 16" in world.view("p0").detail
    assert world.observe("d1") == world.observe("d0") == []
    assert states(world.observe("p0")) == [("p0", EngineState.MISFIT, EngineState.READY)]
    assert states(world.observe("d0", incarnation=Incarnation("i2"), block_size_tokens=Tokens(32))) == [
        ("d0", EngineState.READY, EngineState.MISFIT)
    ], "after its restart it is the later one"


@pytest.mark.parametrize("changes", [{"transfer_group": TransferGroup("h")}, {"model": ModelName("n")}])
def test_block_sizes_need_not_agree_where_no_kv_moves(changes: dict[str, Any]) -> None:
    world = World(fleet=[spec("d0")])
    world.configure(replace(spec("d1"), **changes))
    world.observe("d1", block_size_tokens=Tokens(32), models=(world.view("d1").spec.model,))
    assert state(world, "d1") is EngineState.READY


def test_engines_without_a_connector_may_have_any_block_size() -> None:
    alone = TransferGroup("")
    world = World(fleet=[spec("d0", transfer_group=alone)])
    world.configure(spec("d1", transfer_group=alone))
    world.observe("d1", block_size_tokens=Tokens(32))
    assert state(world, "d1") is EngineState.READY


def test_a_gone_engine_no_longer_sets_the_block_size() -> None:
    world = World(fleet=[spec("d0")])
    world.configure(spec("d1"))
    world.fail("d0")
    world.at(15_000)
    world.observe("d1", block_size_tokens=Tokens(32))
    assert state(world, "d1") is EngineState.READY
    world.configure(spec("d2"))
    world.observe("d2", block_size_tokens=Tokens(32))
    assert state(world, "d2") is EngineState.READY


def test_a_misfit_does_not_set_the_block_size() -> None:
    world = World(fleet=[])
    world.configure(spec("d0", block_size_tokens=Tokens(64)))
    world.observe("d0", block_size_tokens=Tokens(32))
    world.configure(spec("d1"))
    world.observe("d1")
    assert (state(world, "d0"), state(world, "d1")) == (EngineState.MISFIT, EngineState.READY)


def test_a_failing_misfit_becomes_suspect_in_time() -> None:
    world = World(fleet=[spec("d0")], settings=BrokerSettings(placement=PAPER))
    world.observe("d0", models=())
    world.fail("d0")
    assert states(world.at(3_000)) == [("d0", EngineState.MISFIT, EngineState.SUSPECT)]

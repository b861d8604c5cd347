"""Engines that fail, go and restart, and what becomes of their leases."""

import pytest

from conserve_sdk.core import (
    Decision,
    DropReason,
    EngineId,
    EngineRemoved,
    EngineRestarted,
    EngineState,
    EngineStateChanged,
    Incarnation,
    LeaseDropped,
    LeaseVerdict,
    Ms,
)
from tests.core.world import World, engines, only, refused, spec


def states(decisions: list[Decision]) -> list[tuple[str, EngineState, EngineState]]:
    return [(each.engine_id, each.before, each.after) for each in decisions if isinstance(each, EngineStateChanged)]


def state(world: World, engine_id: str) -> EngineState:
    return world.view(engine_id).state


# ---- suspect and gone ----


@pytest.mark.parametrize(("late", "expected"), [(-1, EngineState.READY), (0, EngineState.SUSPECT)])
def test_a_failing_engine_is_suspect_after_a_while(late: int, expected: EngineState) -> None:
    world = World()
    world.now_ms = 10
    assert world.fail("d0", "timed out") == []
    assert world.broker.next_deadline_ms() == 3_000
    world.at(3_000 + late)
    assert state(world, "d0") is expected
    if expected is EngineState.SUSPECT:
        assert world.view("d0").detail == "timed out"
        assert world.broker.next_deadline_ms() == 15_000


def test_a_failure_long_after_the_last_success_tells_at_once() -> None:
    world = World(now_ms=0)
    world.at(5_000)
    assert states(world.fail("d0")) == [("d0", EngineState.READY, EngineState.SUSPECT)]
    world.at(20_000)
    assert states(world.fail("d1")) == [("d1", EngineState.READY, EngineState.GONE)]


@pytest.mark.parametrize(("late", "expected"), [(-1, EngineState.SUSPECT), (0, EngineState.GONE)])
def test_a_failing_engine_is_gone_in_the_end_and_its_leases_with_it(late: int, expected: EngineState) -> None:
    world = World(fleet=engines(decoders=1))
    lease = world.grant("c")
    world.fail("d0", "timed out")
    world.at(14_000)
    decisions = world.at(15_000 + late)
    assert state(world, "d0") is expected
    if expected is EngineState.GONE:
        assert only(LeaseDropped, decisions) == LeaseDropped(lease=lease, reason=DropReason.ENGINE_GONE)
        assert states(decisions) == [("d0", EngineState.SUSPECT, EngineState.GONE)]
        assert "timed out" in world.view("d0").detail
        assert world.renew(lease).verdict is LeaseVerdict.ENGINE_LOST
        assert world.broker.next_deadline_ms() is None


def test_a_gone_engine_that_answers_again_is_ready() -> None:
    world = World()
    world.fail("d0")
    world.at(15_000)
    assert states(world.observe("d0")) == [("d0", EngineState.GONE, EngineState.READY)]
    assert world.broker.counters.engine_restarts == 0


def test_one_success_ends_the_failing() -> None:
    world = World()
    world.fail("d0")
    world.at(2_999)
    assert world.observe("d0") == []
    assert world.broker.next_deadline_ms() is None
    assert world.at(60_000) == []
    assert state(world, "d0") is EngineState.READY


def test_silence_alone_changes_no_state_but_keeps_leases_away() -> None:
    world = World(fleet=engines(decoders=1))
    world.at(10_000)
    world.grant("in time")
    world.at(10_001)
    refusal = refused(world.request("too late"))
    assert "d0 stale" in refusal.detail
    assert state(world, "d0") is EngineState.READY


def test_an_engine_that_never_answered_is_gone_in_the_end() -> None:
    world = World(fleet=[], now_ms=100)
    world.configure(spec("d0"))
    world.fail("d0", "refused")
    assert (world.view("d0").state, world.view("d0").detail) == (EngineState.UNKNOWN, "refused")
    assert world.broker.next_deadline_ms() == 15_100
    assert states(world.at(15_100)) == [("d0", EngineState.UNKNOWN, EngineState.GONE)]


def test_a_failure_without_words_has_a_detail() -> None:
    world = World()
    world.at(5_000)
    world.fail("d0", "")
    assert world.view("d0").detail == "no answer"


def test_a_client_that_cannot_use_an_engine_makes_it_suspect_until_a_newer_scrape() -> None:
    world = World(now_ms=5)
    assert states(world.blame("d0")) == [("d0", EngineState.READY, EngineState.SUSPECT)]
    assert "connection refused" in world.view("d0").detail
    assert world.observe("d0") == [], "this scrape may be older than the report"
    assert state(world, "d0") is EngineState.SUSPECT
    world.now_ms = 6
    assert states(world.observe("d0")) == [("d0", EngineState.SUSPECT, EngineState.READY)]


def test_reports_on_other_incarnations_are_history() -> None:
    world = World()
    assert world.blame("d0", "i0") == []
    world.blame("d0")
    assert states(world.observe("d0", incarnation=Incarnation("i2"))) == [
        ("d0", EngineState.SUSPECT, EngineState.READY)
    ]


def test_a_suspect_engine_can_still_go() -> None:
    world = World()
    world.blame("d0")
    world.fail("d0")
    assert world.broker.next_deadline_ms() == 15_000
    assert states(world.at(15_000)) == [("d0", EngineState.SUSPECT, EngineState.GONE)]


# ---- restarts ----


def test_a_restarted_decoder_drops_its_leases_at_once() -> None:
    world = World()
    lost, kept = world.grant("a"), world.grant("b")
    assert (lost.decoder.engine_id, kept.decoder.engine_id) == ("d0", "d1")
    decisions = world.observe("d0", incarnation=Incarnation("i2"))
    assert only(LeaseDropped, decisions) == LeaseDropped(lease=lost, reason=DropReason.ENGINE_RESTARTED)
    assert only(EngineStateChanged, decisions) == EngineStateChanged(
        engine_id=EngineId("d0"),
        before=EngineState.READY,
        after=EngineState.READY,
        incarnation=Incarnation("i2"),
        detail="restarted",
    )
    assert (world.renew(lost).verdict, world.renew(kept).verdict) == (LeaseVerdict.ENGINE_LOST, LeaseVerdict.OK)
    assert world.grant("c").decoder.incarnation == "i2"
    assert world.broker.counters.engine_restarts == 1


def test_a_restarted_prefiller_drops_nothing_but_its_backlog() -> None:
    world = World()
    world.grant("a")
    assert world.view("p0").backlog_tokens == 1_000
    decisions = world.observe("p0", incarnation=Incarnation("i2"))
    assert (world.broker.lease_count(), world.view("p0").backlog_tokens) == (1, 0)
    assert [type(each) for each in decisions] == [EngineStateChanged]


def reborn(world: World, engine_id: str, *, before: str = "i1") -> list[Decision]:
    return world.broker.apply(
        EngineRestarted(
            now_ms=Ms(world.now_ms),
            engine_id=EngineId(engine_id),
            before=Incarnation(before),
            incarnation=Incarnation("i2"),
        )
    )


def test_an_engine_that_says_it_restarted_loses_its_leases_before_any_scrape() -> None:
    world = World()
    lost, kept = world.grant("a"), world.grant("b")
    decisions = reborn(world, "d0", before=lost.decoder.incarnation)
    assert only(LeaseDropped, decisions) == LeaseDropped(lease=lost, reason=DropReason.ENGINE_RESTARTED)
    assert states(decisions) == [("d0", EngineState.READY, EngineState.UNKNOWN)]
    assert (world.renew(lost).verdict, world.renew(kept).verdict) == (LeaseVerdict.ENGINE_LOST, LeaseVerdict.OK)
    assert world.grant("c").decoder.engine_id == "d1", "nothing is granted on what nobody has seen"
    assert states(world.observe("d0", incarnation=Incarnation("i2"))) == [
        ("d0", EngineState.UNKNOWN, EngineState.READY)
    ]
    assert world.broker.counters.engine_restarts == 1, "and the scrape is no second one"


@pytest.mark.parametrize("when", ["after the scrape", "never observed", "unknown engine"])
def test_an_engines_word_that_says_nothing_new(when: str) -> None:
    world = World()
    if when == "never observed":
        world.apply(EngineRemoved(now_ms=world.now_ms, engine_id=EngineId("d0")))
        world.configure(spec("d0"))
    if when == "after the scrape":
        world.observe("d0", incarnation=Incarnation("i2"))
        world.grant("a")
    restarts = world.broker.counters.engine_restarts
    assert reborn(world, "nobody" if when == "unknown engine" else "d0") == []
    assert world.broker.counters.engine_restarts == restarts

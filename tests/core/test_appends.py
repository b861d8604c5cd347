"""Appends that a prefiller takes: when, and from which length on it is worth asking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conserve_sdk.core import (
    AFFINITY,
    DEFAULT,
    PAPER,
    BrokerSettings,
    EngineId,
    EngineSpec,
    Lease,
    Mode,
    Ms,
    PlacementSettings,
    Ppm,
    PrefillerHosts,
    Role,
    SupersedeCause,
    Tokens,
    TransferGroup,
)
from conserve_sdk.core.prefill import PrefillPlan, append_threshold_tokens, plan_prefill
from tests.core.placing import view
from tests.core.world import SCORE_ALONE, World, granted, spec


def append_world(*, rules: PlacementSettings = SCORE_ALONE, **of_decoder: Any) -> tuple[World, Lease]:
    here = World(
        settings=BrokerSettings(placement=replace(rules, prefiller_hosts=PrefillerHosts.NEVER)),
        fleet=[spec("d0"), spec("p0", Role.PREFILLER)],
    )
    here.observe("d0", running=8)
    lease = here.grant("c", 2_000)
    here.finish(lease, 2_000)
    here.observe("d0", **{"running": 8, **of_decoder})
    return here, lease


def appended(here: World, lease: Lease, tokens: int, *, cached: int = 2_000, **changes: Any) -> tuple[Lease, bool]:
    found = granted(here.supersede(lease, tokens, cause=SupersedeCause.APPEND, cached_tokens=Tokens(cached), **changes))
    return found.lease, found.reused


def test_a_giant_append_is_prefilled_on_a_prefiller_and_moves_to_the_same_decoder() -> None:
    here, lease = append_world()
    moved, reused = appended(here, lease, 22_000)
    assert (reused, moved.epoch, moved.mode) == (False, 2, Mode.MIGRATE)
    assert moved.prefiller is not None
    assert (moved.prefiller.engine_id, moved.decoder) == ("p0", lease.decoder)
    assert (moved.receipt.rule, moved.receipt.prefill_rule) == ("append", "score")
    own, there = moved.receipt.candidates
    # 20000 new tokens at 10000/s beside 8 streams, against the whole prompt there and 20000 tokens over the link.
    assert (own.uncached_tokens, own.score_us) == (20_000, 2_000_000 + 4_800_000)
    assert (there.uncached_tokens, there.score_us) == (22_000, 2_200_000 + 20_000 + 100_000)
    assert here.view("p0").backlog_tokens == 22_000


def test_an_append_that_the_decoder_takes_as_fast_stays() -> None:
    here, lease = append_world()
    stayed, reused = appended(here, lease, 2_300)
    assert (stayed.lease_id, reused) == (lease.lease_id, True)
    assert here.broker.counters.stayed[SupersedeCause.APPEND] == 1


def test_tiny_appends_stay_whatever_the_score() -> None:
    here, lease = append_world(running=500)
    assert appended(here, lease, 2_255)[1]


@pytest.mark.parametrize(("tokens", "rule"), [(5_999, "extra_work"), (6_000, "score")])
def test_a_prefiller_computes_no_more_than_half_as_much_again(tokens: int, rule: str) -> None:
    here, lease = append_world(running=500, rules=DEFAULT)
    moved, reused = appended(here, lease, tokens)
    assert reused is (rule == "extra_work"), "of 6000 tokens it computes all, the decoder the 4000 that are new"
    if not reused:
        assert (moved.receipt.prefill_rule, moved.receipt.candidates[-1].uncached_tokens) == (rule, 6_000)


def test_of_several_prefillers_only_those_with_enough_of_the_preamble_are_weighed() -> None:
    engines = [
        view("d0", running=9),
        view("p0", Role.PREFILLER),
        view("p1", Role.PREFILLER, backlog_tokens=Tokens(900)),
    ]
    cached = {EngineId("d0"): Tokens(4_000), EngineId("p1"): Tokens(2_500)}

    def plan(extra_work_ppm: int) -> PrefillPlan:
        rules = replace(DEFAULT, extra_work_ppm=Ppm(extra_work_ppm))
        return plan_prefill(
            engines[0],
            engines,
            input_tokens=7_000,
            cached=cached,
            failed_engine_id=None,
            settings=BrokerSettings(placement=rules),
            now_ms=Ms(0),
        )

    chosen = plan(500_000)
    assert chosen.prefiller is engines[2], "p0 would be ready first, but computes 7000 tokens for 3000 new ones"
    assert (chosen.rule, [each.verdict for each in chosen.weighed]) == ("score", ["extra_work", "chosen"])
    assert plan(499_999).prefiller is None
    assert (plan(499_999).rule, plan(499_999).uncached_tokens) == ("extra_work", 3_000)
    assert plan(0).rule == "extra_work"


def test_an_append_on_a_decoder_that_lost_the_history_is_the_whole_prompt() -> None:
    here, lease = append_world()
    moved, _ = appended(here, lease, 3_000, cached=0)
    assert moved.receipt.candidates[0].uncached_tokens == 3_000


@pytest.mark.parametrize("kind", ["draining", "stale", "failed prefiller"])
def test_where_nothing_can_be_judged_an_append_stays(kind: str) -> None:
    here, lease = append_world()
    changes: dict[str, Any] = {}
    if kind == "draining":
        here.drain("d0")
    elif kind == "stale":
        here.wait(10_001)
    else:
        changes = {"failed_engine_id": EngineId("p0")}
    assert appended(here, lease, 22_000, **changes)[1]


def test_an_old_epoch_is_answered_with_the_live_lease_and_a_lost_one_with_a_grant() -> None:
    here, lease = append_world()
    moved, _ = appended(here, lease, 22_000)
    assert appended(here, lease, 22_000) == (moved, True)
    here.release(moved)
    again, reused = appended(here, moved, 22_000)
    assert (again.epoch, reused) == (3, False)


def test_ids_are_checked_before_a_move_too() -> None:
    here, lease = append_world()
    with pytest.raises(AssertionError, match="already live"):
        here.supersede(lease, cause=SupersedeCause.APPEND, new_lease_id=lease.lease_id)


class TestThreshold:
    """`append_threshold_tokens`: below it no prefiller can win."""

    def grant(self, *, preset: PlacementSettings = SCORE_ALONE, running: int = 8, **prefiller: Any) -> Lease:
        here = World(
            settings=BrokerSettings(placement=replace(preset, prefiller_hosts=PrefillerHosts.NEVER)),
            fleet=[spec("d0"), spec("p0", Role.PREFILLER)],
        )
        here.observe("d0", running=running)
        here.configure(spec("p0", Role.PREFILLER, **prefiller))
        return here.grant("c", 2_000)

    def test_it_is_where_an_idle_prefiller_breaks_even(self) -> None:
        # 240 us a token beside 8 streams here; 100 us and 5 us for the link there, after 2000 tokens and 20 ms.
        assert self.grant(running=8).append_threshold_tokens == 220_000 // (340 - 105)

    def test_more_streams_lower_it_down_to_the_minimum(self) -> None:
        assert self.grant(running=100).append_threshold_tokens == 256

    def test_a_decoder_that_is_always_faster_asks_for_nothing(self) -> None:
        slow = self.grant(preset=replace(SCORE_ALONE, transfer_tokens_per_s=1_000))
        assert slow.append_threshold_tokens == 0

    @pytest.mark.parametrize(
        "preset", [PAPER, AFFINITY, replace(DEFAULT, move_appends=False), replace(PAPER, move_appends=True)]
    )
    def test_presets_that_move_no_appends_ask_for_nothing(self, preset: PlacementSettings) -> None:
        assert self.grant(preset=preset).append_threshold_tokens == 0

    def test_a_prefiller_out_of_reach_counts_for_nothing(self) -> None:
        assert self.grant(transfer_group=TransferGroup("other")).append_threshold_tokens == 0

    def threshold(self, decoder: str, *, cached: int = 0, extra_work_ppm: int = 10**9, **changes: Any) -> int:
        """Of a lease of 2000 tokens beside 8 streams, no append being too small; so many tokens are at p0 already."""
        here = World(fleet=[spec("d0"), spec("p0", Role.PREFILLER), spec("p1", Role.PREFILLER)])
        here.observe(decoder, running=8)
        here.fail("p1" if decoder == "d0" else "d0")
        here.wait(3_000)
        rules = replace(SCORE_ALONE, local_below_tokens=Tokens(0), extra_work_ppm=Ppm(extra_work_ppm))
        return append_threshold_tokens(
            replace(here.view(decoder), **changes),
            here.broker.engines(),
            context_tokens=2_000,
            cached={EngineId("p0"): Tokens(cached)},
            settings=BrokerSettings(placement=rules),
            now_ms=Ms(3_000),
        )

    @pytest.mark.parametrize(("cached", "us"), [(0, 220_000), (1_000, 120_000), (2_000, 20_000), (3_000, 20_000)])
    def test_a_preamble_there_saves_at_most_the_context(self, cached: int, us: int) -> None:
        assert self.threshold("d0", cached=cached) == us // (340 - 105)

    @pytest.mark.parametrize(
        ("cached", "extra_work_ppm", "tokens"),
        [(0, 500_000, 4_000), (1_000, 500_000, 2_000), (0, 300_000, 6_667), (1_999, 1, 1_000_000), (0, 0, 0)],
    )
    def test_what_would_be_computed_again_is_a_bound_too(self, cached: int, extra_work_ppm: int, tokens: int) -> None:
        assert self.threshold("d0", cached=cached, extra_work_ppm=extra_work_ppm) == tokens

    def test_a_prefiller_that_holds_all_of_it_computes_nothing_again(self) -> None:
        assert self.threshold("d0", cached=2_000, extra_work_ppm=0) == 20_000 // (340 - 105)

    @pytest.mark.parametrize(("tokens", "stays"), [(2_000 + 3_999, True), (2_000 + 4_000, False)])
    def test_the_bound_is_the_same_as_when_it_is_decided(self, tokens: int, stays: bool) -> None:
        here, lease = append_world(running=500, rules=DEFAULT)
        assert lease.append_threshold_tokens == 4_000
        assert appended(here, lease, tokens)[1] is stays

    def test_all_its_leases_may_decode_at_once_and_this_one_too(self) -> None:
        assert self.threshold("d0", running=0, leases=7) == 220_000 // (340 - 105)

    def test_what_a_prefiller_hosts_stays_there(self) -> None:
        assert self.threshold("p0") == 0

    @pytest.mark.parametrize("fleet", [[spec("d0"), spec("d1")], [spec("d0", Role.BOTH)]])
    def test_decoders_and_the_engine_itself_are_no_prefillers(self, fleet: list[EngineSpec]) -> None:
        here = World(settings=BrokerSettings(), fleet=fleet)
        here.observe("d0", running=8)
        assert here.grant("c", 2_000, hint=EngineId("d0")).append_threshold_tokens == 0

    @pytest.mark.parametrize(("tokens", "moves"), [(2_000 + 936, False), (2_000 + 937, True)])
    def test_the_score_agrees_with_it(self, tokens: int, moves: bool) -> None:
        here, lease = append_world()
        assert lease.append_threshold_tokens == 936
        assert appended(here, lease, tokens)[1] is not moves

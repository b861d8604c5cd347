"""Placement: which decoder, and where the first turn is prefilled."""

from dataclasses import replace
from typing import Any

import pytest

from conserve_sdk.core import (
    AFFINITY,
    DEFAULT,
    PAPER,
    PRESETS,
    BrokerSettings,
    EngineId,
    EngineState,
    EngineView,
    Mode,
    Ms,
    PlacementSettings,
    PrefillChoice,
    RefusalReason,
    Role,
    Tokens,
    TransferGroup,
)
from conserve_sdk.core.placement import NoPlacement
from tests.core.placing import decoder, leased, outcome, placed, prefill, view
from tests.core.world import SCORE_ALONE, World, engines, spec

# ---- decoder ----


def test_the_lowest_load_after_placement_wins() -> None:
    assert decoder([leased("d0", 2_000), leased("d1", 1_000), leased("d2", 3_000)]) == "d1"


def test_load_is_relative_to_capacity_and_counts_the_newcomer() -> None:
    small = leased("small", 0, kv_capacity_tokens=Tokens(10_000))
    large = leased("large", 8_999)
    assert decoder([small, large], tokens=1_000) == "large"
    assert decoder([small, leased("large", 9_000)], tokens=1_000) == "large", "tie by id"
    assert decoder([small, leased("large", 9_001)], tokens=1_000) == "small"


def test_what_was_scraped_above_the_ledger_counts() -> None:
    assert decoder([leased("d0", 1_000, kv_used_tokens=Tokens(5_000)), leased("d1", 4_000)]) == "d1"


def test_a_hint_wins_within_the_slack_and_not_above() -> None:
    def chosen(hinted_tokens: int, preset: PlacementSettings) -> tuple[str, str]:
        found = placed([leased("d0", 0), leased("d1", hinted_tokens)], preset=preset, hint=EngineId("d1"))
        return found.decoder.engine_id, found.receipt.rule

    # What is leased counts once as active and a quarter more as leased.
    assert chosen(24_000, DEFAULT) == ("d1", "hint")
    assert chosen(24_001, DEFAULT) == ("d0", "most_free_kv")
    assert chosen(1, PAPER) == ("d0", "most_free_kv")
    assert chosen(0, PAPER) == ("d1", "hint")


def test_a_hint_that_does_not_fit_is_ignored() -> None:
    views = [leased("d0", 0), leased("d1", 99_500)]
    assert decoder(views, hint=EngineId("d1"), preset=replace(PAPER, hint_slack_ppm=DEFAULT.kv_watermark_ppm)) == "d0"


def test_what_the_reserve_leaves_is_never_below_nothing() -> None:
    found = outcome([view("d0")], preset=replace(PAPER, reserve_tokens=Tokens(100_001)))
    assert isinstance(found, NoPlacement)
    assert (found.reason, found.hopeless) == (RefusalReason.PROMPT_TOO_LONG, True)
    assert "the largest decoder of m takes 0:" in found.detail


def test_a_refusal_names_what_is_against_each_engine() -> None:
    found = outcome([view("d0", state=EngineState.DRAINING), view("p0", Role.PREFILLER)], preset=DEFAULT)
    assert isinstance(found, NoPlacement)
    assert (found.reason, found.hopeless) == (RefusalReason.NO_READY_ENGINE, False)
    assert "(d0 draining, p0 prefilling)" in found.detail


def test_a_failed_engine_is_left_out() -> None:
    assert decoder([view("d0"), view("d1")], failed_engine_id=EngineId("d0")) == "d1"


def test_a_decoder_that_is_also_a_prefiller_may_host_but_not_prefill_for_itself() -> None:
    assert prefill([view("b0", Role.BOTH)]) == (None, "no_prefiller")
    assert prefill([view("b0", Role.BOTH), leased("b1", 1, spec=spec("b1", Role.BOTH))]) == ("b1", "always_prefiller")


# ---- prefiller: who may ----


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"state": EngineState.SUSPECT}, "suspect"),
        ({"observed_at_ms": Ms(-10_001)}, "stale"),
        ({"spec": spec("p0", Role.PREFILLER, transfer_group=TransferGroup("h"))}, "no_common_transfer_group"),
        ({"spec": spec("p0", Role.PREFILLER, transfer_group=TransferGroup(""))}, "no_common_transfer_group"),
        ({"block_size_tokens": Tokens(32)}, "block_size_differs"),
        ({"kv_capacity_tokens": Tokens(999)}, "prompt_too_long"),
        ({"max_model_len_tokens": Tokens(999)}, "prompt_too_long"),
        ({"kv_capacity_tokens": Tokens(1_000), "max_model_len_tokens": Tokens(1_000)}, "always_prefiller"),
        ({"kv_capacity_tokens": Tokens(0)}, "always_prefiller"),
        ({"observed_at_ms": Ms(-10_000)}, "always_prefiller"),
    ],
)
def test_an_unusable_prefiller_leaves_the_prefill_to_the_decoder(changes: dict[str, Any], rule: str) -> None:
    found = placed([view("d0"), replace(view("p0", Role.PREFILLER), **changes)])
    assert found.receipt.prefill_rule == rule
    assert (found.prefiller is None) is (rule != "always_prefiller")
    assert found.receipt.candidates[-1].verdict == ("chosen" if found.prefiller else rule)


def test_engines_without_a_connector_never_exchange_kv() -> None:
    alone = TransferGroup("")
    views = [
        view("d0", spec=spec("d0", transfer_group=alone)),
        view("p0", spec=spec("p0", Role.PREFILLER, transfer_group=alone)),
    ]
    assert prefill(views) == (None, "no_common_transfer_group")


def test_different_hindrances_are_told_apart_in_the_candidates() -> None:
    found = placed(
        [view("d0"), view("p0", Role.PREFILLER, state=EngineState.GONE), view("p1", Role.PREFILLER)],
        failed_engine_id=EngineId("p1"),
    )
    assert found.receipt.prefill_rule == "no_usable_prefiller"
    assert [each.verdict for each in found.receipt.candidates] == ["chosen", "gone", "failed"]


# ---- prefiller: which ----


def test_the_papers_rule_takes_the_least_backlog_whatever_it_is() -> None:
    views = [
        view("d0"),
        view("p0", Role.PREFILLER, backlog_tokens=Tokens(2_000)),
        view("p1", Role.PREFILLER, backlog_tokens=Tokens(1_000)),
        view("p2", Role.PREFILLER, backlog_tokens=Tokens(1_000)),
    ]
    assert prefill(views) == ("p1", "always_prefiller")
    assert prefill(views, tokens=1) == ("p1", "always_prefiller")


def score_views(**of_decoder: Any) -> list[EngineView]:
    """A decoder with streams, and a prefiller at the same rate."""
    return [view("d0", **of_decoder), view("p0", Role.PREFILLER)]


def test_the_score_is_what_the_policy_study_says() -> None:
    found = placed(
        [
            view("d0", backlog_tokens=Tokens(3_000), busy=2, running=4, rate_tokens_per_s=5_000),
            view("p0", Role.PREFILLER, backlog_tokens=Tokens(500), running=9, rate_tokens_per_s=20_000),
        ],
        preset=SCORE_ALONE,
        tokens=2_000,
    )
    at_decoder, at_prefiller = (each.score_us for each in found.receipt.candidates)
    # (3000 + 2000) / 5000 s, and .3 * 4 streams * 2000 / 5000 s of harm
    assert at_decoder == 1_000_000 + 480_000
    # (500 + 2000) / 20000 s, 20 ms and 2000 tokens over a link of 200000 tokens/s; nobody decodes there
    assert at_prefiller == 125_000 + 20_000 + 10_000
    assert found.prefiller is not None
    assert (found.receipt.prefill_rule, found.receipt.candidates[1].verdict) == ("score", "chosen")


def test_without_a_weight_nobody_is_harmed() -> None:
    preset = PlacementSettings(name="own", prefill_choice=PrefillChoice.SCORE)
    assert placed(score_views(busy=4), preset=preset, tokens=2_000).receipt.candidates[0].score_us == 200_000


def test_busy_leases_count_where_the_scrape_saw_less() -> None:
    found = placed(score_views(busy=4, running=1), preset=SCORE_ALONE, tokens=2_000)
    assert found.receipt.candidates[0].score_us == 200_000 + 240_000


def test_streams_on_an_engine_of_both_roles_count_as_harm_there_too() -> None:
    both = view("b0", Role.BOTH, running=1, kv_leased_tokens=Tokens(5_000))
    found = placed([view("d0", busy=9), both], preset=SCORE_ALONE, tokens=2_000)
    assert found.receipt.candidates[-1].score_us == 200_000 + 60_000 + 30_000


def test_an_idle_decoder_prefills_for_itself() -> None:
    assert prefill(score_views(), preset=SCORE_ALONE) == (None, "score")


def test_a_busy_decoder_sends_the_prefill_away() -> None:
    assert prefill(score_views(busy=4), preset=DEFAULT, tokens=8_000) == ("p0", "score")


def test_a_tie_stays_on_the_decoder() -> None:
    # The decoder's backlog of 250 tokens costs 25 ms, exactly what the move of 1000 tokens costs.
    assert prefill(score_views(backlog_tokens=Tokens(250)), preset=SCORE_ALONE, tokens=1_000) == (None, "score")
    assert prefill(score_views(backlog_tokens=Tokens(251)), preset=SCORE_ALONE, tokens=1_000) == ("p0", "score")


def test_equal_prefillers_tie_by_id() -> None:
    views = [view("d0", busy=9), view("p1", Role.PREFILLER), view("p0", Role.PREFILLER)]
    assert prefill(views, preset=DEFAULT, tokens=8_000) == ("p0", "score")


@pytest.mark.parametrize(("tokens", "rule"), [(2_047, "below_minimum"), (2_048, "score")])
def test_tiny_first_turns_stay_on_the_decoder(tokens: int, rule: str) -> None:
    chosen = prefill(score_views(busy=99), preset=DEFAULT, tokens=tokens)
    assert chosen == (None if rule == "below_minimum" else "p0", rule)


# ---- receipts ----


def test_a_receipt_lists_the_chosen_and_the_best_others_per_role() -> None:
    views = [
        *(leased(f"d{index}", 1_000 * (9 - index)) for index in range(8)),
        leased("d8", 99_999),
        *(view(f"p{index}", Role.PREFILLER, backlog_tokens=Tokens(1_000 * (9 - index))) for index in range(6)),
        view("p7", Role.PREFILLER, state=EngineState.GONE),
    ]
    candidates = placed(views, preset=SCORE_ALONE, tokens=1_000, hint=EngineId("d2")).receipt.candidates
    assert [(each.engine_id, each.verdict) for each in candidates] == [
        ("d2", "chosen"),
        ("d5", "fits"),
        ("d6", "fits"),
        ("d7", "fits"),
        ("p2", "fits"),
        ("p3", "fits"),
        ("p4", "fits"),
        ("p5", "fits"),
    ]
    hosts = [
        candidate for candidate in placed([*views[:2], *views[8:]]).receipt.candidates if candidate.role == "decoder"
    ]
    assert [candidate.verdict for candidate in hosts] == ["fits", "chosen", "over_watermark"]


def test_a_receipt_shows_engines_that_fit_before_emptier_ones_that_do_not() -> None:
    views = [*(leased(f"d{index}", 1_000 * index) for index in range(4)), view("d4", state=EngineState.DRAINING)]
    assert [each.engine_id for each in placed(views).receipt.candidates] == ["d0", "d1", "d2", "d3"]


def test_a_receipt_shows_the_chosen_prefiller_even_if_it_is_the_last() -> None:
    views = [view(f"p{index}", Role.PREFILLER, backlog_tokens=Tokens(9 - index)) for index in range(6)]
    shown = [each for each in placed([view("d0"), *views]).receipt.candidates if each.role == "prefiller"]
    assert [(each.engine_id, each.verdict) for each in shown][2:] == [("p2", "fits"), ("p5", "chosen")]


def test_where_no_score_was_computed_the_receipt_has_none() -> None:
    found = placed([view("d0"), view("d1"), view("p0", Role.PREFILLER), view("p1", Role.PREFILLER)])
    assert {(each.score_us, each.uncached_tokens) for each in found.receipt.candidates} == {(-1, -1)}


def test_receipts_share_the_lines_that_say_the_same() -> None:
    views = [view("d0"), view("d1")]
    first, second = placed(views).receipt, placed(views).receipt
    assert first.candidates[1] is second.candidates[1]


@pytest.mark.parametrize("scores", [(-1, 0, -1), (0, -1, 0)])
def test_a_line_with_a_score_is_shared_with_none_without(scores: tuple[int, ...]) -> None:
    seen = view("d0")
    assert tuple(seen.as_candidate("decoder", "chosen", score, score).score_us for score in scores) == scores


def test_presets_are_found_by_their_names() -> None:
    assert PRESETS == {"paper": PAPER, "default": DEFAULT, "affinity": AFFINITY}


def test_the_modes_follow_from_the_presets() -> None:
    modes = {
        name: World(fleet=engines(), settings=BrokerSettings(placement=preset)).grant("c", 8_000).mode
        for name, preset in PRESETS.items()
    }
    assert modes == {"paper": Mode.MIGRATE, "default": Mode.LOCAL, "affinity": Mode.LOCAL}

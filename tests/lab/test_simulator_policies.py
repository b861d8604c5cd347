"""What sets the simulated policies apart, each on a workload on which it shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conserve_lab.hardware import engine_kind
from conserve_lab.simulator import POLICIES, Policy, simulate, summarise
from conserve_lab.simulator.faults import Fault, FaultKind
from conserve_lab.simulator.saturation import saturation_per_s
from conserve_lab.workloads import Conversation, Turn, generate
from conserve_sdk._slices import cuts

KIND = engine_kind("a40/qwen3-0.6b")


def talk(turns: int, *, append: int, output: int = 20) -> Conversation:
    first = Turn(append_tokens=4_000, output_tokens=output, gap_us=500_000)
    later = Turn(append_tokens=append, output_tokens=output, gap_us=500_000)
    return Conversation(conversation_id="c", turns=(first, *[later] * (turns - 1)))


def figures(name: str, conversations: list[Conversation], *, per_s: float = 2.0, **changes: Any) -> dict[str, Any]:
    policy: Policy = replace(POLICIES[name], **changes)
    return summarise(simulate(conversations, policy, [KIND] * 4, per_s=per_s, seed=1))


def test_a_prefiller_that_pulls_the_history_computes_no_answer_twice() -> None:
    conversations = [talk(6, append=300, output=400) for _ in range(6)]
    sticky, history = (figures(name, conversations) for name in ("pd-sticky", "pd-history"))
    assert sticky["reprefilled_tokens"] > 5 * 6 * 300, "the decoder's answers are new to the prefiller"
    assert history["reprefilled_tokens"] == 0
    assert history["moved_tokens"] > sticky["moved_tokens"], "the history moves instead"


@pytest.mark.parametrize(("append", "hops"), [(1_024, 1), (1_025, 4)])
def test_the_suffix_rule_goes_by_what_the_decoder_lacks(append: int, hops: int) -> None:
    conversations = [talk(4, append=append) for _ in range(5)]
    assert figures("suffix", conversations)["migrations"] == 5 * hops


def test_an_estimate_sends_only_what_pays_and_an_error_changes_the_choice() -> None:
    small, large = ([talk(3, append=append) for _ in range(8)] for append in (50, 20_000))
    assert figures("ampd", small)["migrations"] == 8, "moving a history for fifty tokens never pays"
    perfect = figures("ampd", large, per_s=20)
    wrong = figures("ampd-error", large, per_s=20)
    assert perfect["migrations"] > 8
    assert perfect["migrations"] != wrong["migrations"]


def test_an_oracle_reserves_the_end_from_the_start() -> None:
    conversations = [talk(4, append=40_000) for _ in range(9)]
    grow, oracle = (figures(name, conversations, per_s=50) for name in ("paper", "paper-oracle"))
    assert oracle["queue_wait_p95_ms"] > grow["queue_wait_p95_ms"]


def test_routers_without_a_broker_admit_everyone() -> None:
    conversations = [Conversation(conversation_id="c", turns=(Turn(append_tokens=150_000, output_tokens=9),))] * 12
    free, admitted = (figures(name, conversations, per_s=100) for name in ("router-sticky", "a0"))
    assert free["queue_wait_p95_ms"] == 0 < admitted["queue_wait_p95_ms"]


@pytest.mark.parametrize(
    ("prompt_tokens", "expected"), [(12, []), (13, [8]), (20, [8]), (21, [8, 16]), (100, [*range(8, 96, 8)])]
)
def test_the_rest_of_a_sliced_prompt_is_half_a_slice_to_one_and_a_half(prompt_tokens: int, expected: list[int]) -> None:
    assert list(cuts(prompt_tokens, held=0, size=8)) == expected
    moved = cuts(prompt_tokens + 5, held=5, size=8)
    assert [tokens - 5 for tokens in moved] == expected, "what the engine holds is not cut"


def test_short_prompts_pass_a_long_one_between_its_slices() -> None:
    """One engine: the long prompt takes it for 20 s, the short ones come behind it."""
    long, short = (
        Conversation(conversation_id="c", turns=(Turn(append_tokens=tokens, output_tokens=2),))
        for tokens in (90_000, 300)
    )
    conversations = [long, *[short] * 9]

    def last_first_token_us(name: str) -> tuple[int, int]:
        policy = replace(POLICIES[name], prefill_share=0, long_prefill_tokens=0)
        outcome = simulate(conversations, policy, [KIND], per_s=50, seed=1)
        waits = [story.first_tokens_us[0] - story.arrived_us for story in outcome.stories]
        return waits[0], max(waits[1:])

    (whole_us, behind_us), (sliced_us, passing_us) = last_first_token_us("default"), last_first_token_us("sliced")
    assert passing_us * 5 < behind_us, "they wait for a slice, not for the prompt"
    assert sliced_us < whole_us * 1.1, "the long one pays for the steps that it shares"


def test_short_prompts_pass_one_long_prompt_of_default_and_wait_behind_two() -> None:
    """Of a step of 768 tokens the first long prompt takes 384, the second the rest."""

    def longest_wait_us(longs: int) -> int:
        sizes = [90_000] * longs + [300] * 5
        conversations = [
            Conversation(conversation_id="c", turns=(Turn(append_tokens=tokens, output_tokens=2),)) for tokens in sizes
        ]
        policy = replace(POLICIES["default"], prefill_share=0)
        outcome = simulate(conversations, policy, [KIND], per_s=50, seed=1)
        return max(story.first_tokens_us[0] - story.arrived_us for story in outcome.stories[longs:])

    assert longest_wait_us(1) < 1_000_000
    assert longest_wait_us(2) > 10_000_000


def test_long_prompts_stay_in_the_order_in_which_they_came() -> None:
    conversations = [Conversation(conversation_id="c", turns=(Turn(append_tokens=30_000, output_tokens=2),))] * 4
    outcome = simulate(conversations, replace(POLICIES["sliced"], prefill_share=0), [KIND], per_s=50, seed=1)
    one, two, three, four = (story.first_tokens_us[0] for story in outcome.stories)
    # While one's next slice is on its way the second gets a turn, so two share the engine, but never all of them.
    assert one < two < three < four
    assert three - two > 4 * (two - one)
    assert sum(story.reprefilled_tokens for story in outcome.stories) == 0


def test_a_sliced_prompt_outlives_the_engine_that_computes_it() -> None:
    conversations = [Conversation(conversation_id="c", turns=(Turn(append_tokens=90_000, output_tokens=2),))]
    dies = (Fault(kind=FaultKind.FAIL, at_us=3_000_000),)
    outcome = simulate(conversations, POLICIES["sliced"], [KIND] * 2, per_s=50, seed=1, faults=dies)
    assert [len(story.first_tokens_us) for story in outcome.stories] == [1]


def test_constants_of_a_preset_can_differ() -> None:
    conversations = list(generate("swe-padded", conversations=10, seed=1))
    hosts = figures("default", conversations, placement=(("local_below_tokens", 1_000_000),))
    assert hosts["migrations"] < figures("default", conversations)["migrations"]


def test_a_conversation_costs_what_its_work_takes() -> None:
    conversations = list(generate("swe-padded", conversations=50, seed=1))
    one = saturation_per_s(conversations, KIND, engines=1)
    assert saturation_per_s(conversations, KIND, engines=4) == pytest.approx(4 * one)
    longer = [replace(each, turns=each.turns * 2) for each in conversations]
    assert one / 4 < saturation_per_s(longer, KIND, engines=1) < one
    calm = summarise(simulate(conversations, POLICIES["a2"], [KIND] * 4, per_s=one, seed=1))
    crowded = summarise(simulate(conversations, POLICIES["a2"], [KIND] * 4, per_s=16 * one, seed=1))
    assert crowded["ttfet_p95_norm"] > 1.5 * calm["ttfet_p95_norm"]

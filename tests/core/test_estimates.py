"""What is learnt from observation, and the backlog of prefills."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk.core import EngineId, Incarnation, LeaseId, ModelName, Ms, Tokens
from conserve_sdk.core.backlog import Backlog
from conserve_sdk.core.estimates import TokensPerByte, averaged_rate
from tests.core.world import M, World, engines


def test_the_ratio_starts_at_a_quarter_and_moves_by_an_eighth() -> None:
    ratios = TokensPerByte()
    assert (ratios.ppm(M), ratios.tokens(M, 1_001)) == (250_000, 251)
    ratios.learn(M, prompt_tokens=Tokens(500), prompt_bytes=1_000)
    assert ratios.ppm(M) == (7 * 250_000 + 500_000) // 8
    assert ratios.ppm(ModelName("other")) == 250_000


@pytest.mark.parametrize(("tokens", "size"), [(0, 1_000), (100, 255), (100, 0)])
def test_samples_that_say_nothing_are_left_out(tokens: int, size: int) -> None:
    ratios = TokensPerByte()
    ratios.learn(M, prompt_tokens=Tokens(tokens), prompt_bytes=size)
    assert ratios.ppm(M) == 250_000


@pytest.mark.parametrize(
    ("tokens", "size", "clamped", "settled"), [(10**8, 256, 2_000_000, 1_999_993), (1, 10**9, 10_000, 10_000)]
)
def test_absurd_samples_are_clamped(tokens: int, size: int, clamped: int, settled: int) -> None:
    ratios = TokensPerByte()
    ratios.learn(M, prompt_tokens=Tokens(tokens), prompt_bytes=size)
    assert ratios.ppm(M) == (7 * 250_000 + clamped) // 8
    for _ in range(200):
        ratios.learn(M, prompt_tokens=Tokens(tokens), prompt_bytes=size)
    assert ratios.ppm(M) == settled, "rounded down by each average"


def test_a_smallest_sample_counts() -> None:
    ratios = TokensPerByte()
    ratios.learn(M, prompt_tokens=Tokens(128), prompt_bytes=256)
    assert ratios.ppm(M) == (7 * 250_000 + 500_000) // 8


@pytest.mark.parametrize(
    ("rate", "tokens", "took_ms", "expected"),
    [
        (0, 1_000, 100, 10_000),
        (4_000, 1_000, 100, 5_500),
        (4_000, 1_000, 0, 4_000),
        (4_000, 255, 100, 4_000),
        (0, 256, 1_000, 256),
        (0, 256, 10_000_000, 1),
        (0, 10**9, 1, 10_000_000),
    ],
)
def test_a_rate_is_an_average_of_clamped_samples(rate: int, tokens: int, took_ms: int, expected: int) -> None:
    assert averaged_rate(rate, tokens=tokens, took_ms=Ms(took_ms)) == expected


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9))))
def test_a_rate_stays_usable_whatever_is_reported(samples: list[tuple[int, int]]) -> None:
    rate = 0
    for tokens, took_ms in samples:
        before, rate = rate, averaged_rate(rate, tokens=tokens, took_ms=Ms(took_ms))
        assert min(before, 1) <= rate <= 10_000_000, "once there is a rate, it can be divided by"


# ---- through the broker ----


def test_finished_turns_teach_the_ratio_and_the_rate() -> None:
    world = World()
    lease = world.grant("c", 1_000)
    world.finish(
        lease,
        1_100,
        prompt_tokens=Tokens(1_000),
        prompt_bytes=2_000,
        cached_tokens=Tokens(200),
        prefill_ms=Ms(100),
        prefill_engine_id=EngineId("p0"),
    )
    assert world.broker.tokens_per_byte_ppm(M) == (7 * 250_000 + 500_000) // 8
    assert world.view("p0").rate_tokens_per_s == 8_000


def test_the_tokens_that_stood_before_a_prefill_belong_to_its_time() -> None:
    world = World(fleet=engines(decoders=1))
    world.grant("first", 3_000)
    lease = world.grant("second", 1_000)
    assert world.view("p0").backlog_tokens == 4_000
    world.finish(lease, 1_100, prompt_tokens=Tokens(1_000), prefill_ms=Ms(400), prefill_engine_id=EngineId("p0"))
    assert (world.view("p0").rate_tokens_per_s, world.view("p0").backlog_tokens) == (10_000, 3_000)


def test_only_engines_of_the_lease_are_learnt_about() -> None:
    world = World()
    lease = world.grant("c", 1_000)
    for engine_id in (None, EngineId("d1"), EngineId("nobody")):
        world.finish(lease, 1_100, prompt_tokens=Tokens(1_000), prefill_ms=Ms(1), prefill_engine_id=engine_id)
    assert [view.rate_tokens_per_s for view in world.broker.engines()] == [10_000] * 3
    world.finish(lease, 1_100, prompt_tokens=Tokens(1_000), prefill_ms=Ms(1_000), prefill_engine_id=EngineId("d0"))
    assert world.view("d0").rate_tokens_per_s == 1_000


def test_an_engines_own_counters_are_believed_before_reports() -> None:
    world = World()
    lease = world.grant("c", 1_000)
    again = Incarnation("i2")
    world.observe("p0", incarnation=again, prefill_tokens_total=Tokens(5_000), prefill_busy_ms_total=Ms(1_000))
    assert world.view("p0").rate_tokens_per_s == 10_000, "one reading is no rate"
    world.observe("p0", incarnation=again, prefill_tokens_total=Tokens(7_000), prefill_busy_ms_total=Ms(1_500))
    assert world.view("p0").rate_tokens_per_s == 4_000
    world.finish(lease, 1_100, prompt_tokens=Tokens(1_000), prefill_ms=Ms(1), prefill_engine_id=EngineId("p0"))
    assert world.view("p0").rate_tokens_per_s == 4_000
    world.observe("p0", incarnation=again, prefill_tokens_total=Tokens(7_400), prefill_busy_ms_total=Ms(1_501))
    assert world.view("p0").rate_tokens_per_s == (3 * 4_000 + 400_000) // 4, "a millisecond is a sample"


def test_a_restart_is_no_sample() -> None:
    world = World()
    world.observe("p0", prefill_tokens_total=Tokens(5_000), prefill_busy_ms_total=Ms(1_000))
    assert world.view("p0").rate_tokens_per_s == 5_000
    world.observe(
        "p0",
        incarnation=Incarnation("i2"),
        prefill_tokens_total=Tokens(9_000),
        prefill_busy_ms_total=Ms(1_100),
    )
    assert world.view("p0").rate_tokens_per_s == 5_000


# ---- backlog ----


def test_backlog_is_what_was_dispatched_and_not_finished() -> None:
    world = World(fleet=engines(decoders=2, prefillers=1))
    first, second = world.grant("a", 1_000), world.grant("b", 2_000)
    assert world.view("p0").backlog_tokens == 3_000
    world.finish(first, 1_100)
    assert world.view("p0").backlog_tokens == 2_000
    world.release(second)
    assert world.view("p0").backlog_tokens == 0


def test_a_local_prefill_is_backlog_of_the_decoder_and_a_waiting_estimate_is_not() -> None:
    world = World(fleet=engines(decoders=1, prefillers=0))
    world.grant("a", 1_000)
    assert world.view("d0").backlog_tokens == 1_000


def test_the_engines_counter_drains_its_backlog() -> None:
    world = World(fleet=engines(decoders=2))
    first = world.grant("a", 1_000)
    world.grant("b", 2_000)
    world.observe("p0", prefill_tokens_total=Tokens(600))
    assert world.view("p0").backlog_tokens == 2_400
    world.observe("p0", prefill_tokens_total=Tokens(1_600))
    assert world.view("p0").backlog_tokens == 1_400
    world.finish(first, 1_100)
    assert world.view("p0").backlog_tokens == 1_400
    world.observe("p0", prefill_tokens_total=Tokens(9_999))
    assert world.view("p0").backlog_tokens == 0


@pytest.mark.parametrize(("late", "left"), [(-1, 3_000), (0, 2_000)])
def test_what_nobody_reports_on_is_too_old_in_the_end(late: int, left: int) -> None:
    world = World()
    world.grant("a", 1_000)
    world.now_ms = 100
    world.grant("b", 2_000)
    world.at(30_000 + late)
    assert world.view("p0").backlog_tokens == left
    world.at(30_100 + late)
    assert world.view("p0").backlog_tokens == (2_000 if late else 0)


def test_pruning_looks_again_when_there_is_something_again() -> None:
    world = World()
    world.grant("a", 1_000)
    world.at(30_000)
    world.observe("d0")
    world.observe("d1")
    world.observe("p0")
    world.grant("b", 500)
    assert world.view("p0").backlog_tokens == 500
    world.at(60_000)
    assert world.view("p0").backlog_tokens == 0


def test_pruning_says_whether_anything_was_too_old() -> None:
    backlog = Backlog()
    assert not backlog.prune(until_ms=10)
    backlog.dispatch(LeaseId("l1"), tokens=5, now_ms=Ms(10))
    assert not backlog.prune(until_ms=9)
    assert backlog.prune(until_ms=10)
    assert backlog.tokens == 0


@given(st.lists(st.tuples(st.sampled_from("dfr"), st.integers(0, 5), st.integers(0, 40))))
def test_a_backlog_is_the_sum_of_its_parts_and_never_negative(steps: list[tuple[str, int, int]]) -> None:
    backlog, parts = Backlog(), dict[str, int]()
    for kind, name, tokens in steps:
        if kind == "d" and f"l{name}" not in parts:
            backlog.dispatch(LeaseId(f"l{name}"), tokens=tokens, now_ms=Ms(0))
            parts[f"l{name}"] = tokens
        elif kind == "f":
            backlog.finish(LeaseId(f"l{name}"))
            parts.pop(f"l{name}", None)
        elif kind == "r":
            backlog.drain(tokens)
            left = tokens
            for each in parts:
                taken = min(left, parts[each])
                parts[each] -= taken
                left -= taken
        assert backlog.tokens == sum(parts.values())
    assert (backlog.oldest_at_ms is None) is (not parts)

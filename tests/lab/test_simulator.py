"""The simulator: exact, repeatable, and true to what one can work out by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_lab.hardware import engine_kind
from conserve_lab.simulator import POLICIES, Policy, simulate, summarise
from conserve_lab.simulator.fleet import BLOCK_SIZE
from conserve_lab.simulator.gaps import Gaps
from conserve_lab.simulator.isolated import isolated
from conserve_lab.simulator.summary import ISOLATED_CHUNK
from conserve_lab.workloads import SHAPES, Conversation, Turn, generate

KIND = engine_kind("a40/qwen3-0.6b")
ALONE = Policy(name="alone", about="one engine", preset="affinity", decode_chunk=ISOLATED_CHUNK)

turns = st.builds(
    Turn,
    append_tokens=st.integers(1, 20_000),
    output_tokens=st.integers(1, 300),
    gap_us=st.integers(0, 3_000_000),
)


@given(st.lists(turns, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_conversation_alone_takes_its_isolated_time(conversation: list[Turn]) -> None:
    alone = Conversation(conversation_id="c", turns=tuple(conversation))
    outcome = simulate([alone], ALONE, [KIND], per_s=1, seed=1)
    (story,) = outcome.stories
    expected = isolated(alone, KIND, chunk_tokens=ISOLATED_CHUNK, block_size=BLOCK_SIZE)
    assert story.first_tokens_us[-1] - story.arrived_us == expected.ttfet_us
    assert story.done_us - story.arrived_us == expected.e2e_us
    assert len(outcome.last_gaps) == conversation[-1].output_tokens - 1
    assert story.reprefilled_tokens == 0


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("shape", ["swe-padded", "giant-appends"])
def test_every_policy_ends_every_conversation(name: str, shape: str) -> None:
    conversations = generate(shape, conversations=12, seed=3)
    outcome = simulate(conversations, POLICIES[name], [KIND] * 4, per_s=2, seed=3)
    figures = summarise(outcome)
    outputs = sum(conversation.turns[-1].output_tokens - 1 for conversation in conversations)
    assert len(outcome.last_gaps) == outputs, "every token of every last turn was seen"
    assert all(
        len(story.first_tokens_us) == len(c.turns) for story, c in zip(outcome.stories, conversations, strict=True)
    )
    assert figures["ttfet_p50_norm"] >= 0.99
    match name:
        case "a0" | "a0-host" | "a2" | "round-robin" | "router-sticky":
            assert figures["moved_tokens"] == figures["migrations"] == 0
        case "paper" | "paper-oracle":
            assert figures["migrations"] == len(conversations), "each conversation moves once"
        case "ampd-10":
            assert len(conversations) < figures["migrations"] < 3 * len(conversations)
        case "pd-full" | "pd-sticky" | "pd-history" | "pd-round-robin" | "router-pd":
            assert figures["migrations"] == sum(len(conversation.turns) for conversation in conversations)


def test_the_same_seed_gives_the_same_run_whatever_the_hash_seed() -> None:
    code = """
import json
from conserve_lab.hardware import engine_kind
from conserve_lab.simulator import POLICIES, simulate, summarise
from conserve_lab.workloads import generate

kinds = [engine_kind("a40/qwen3-0.6b")] * 4
run = simulate(generate("coding", conversations=10, seed=5), POLICIES["default"], kinds, per_s=2, seed=5)
print(json.dumps(summarise(run)))
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    ]
    assert runs[0] == runs[1]
    other = simulate(generate("coding", conversations=10, seed=6), POLICIES["default"], [KIND] * 4, per_s=2, seed=6)
    assert json.loads(runs[0]) != summarise(other)


def test_percentiles_of_counted_gaps_are_nearest_rank() -> None:
    gaps = Gaps()
    assert gaps.percentile_us(50) is None
    gaps.add(10, 98)
    gaps.add(500)
    gaps.add(900)
    assert [gaps.percentile_us(p) for p in (50, 98, 99, 99.9)] == [10, 10, 500, 900]


def test_work_costs_energy_and_idling_does_too() -> None:
    few, many = (
        summarise(simulate(generate("service", conversations=n, seed=1), POLICIES["a0"], [KIND] * 2, per_s=5, seed=1))
        for n in (5, 20)
    )
    assert many["kilojoules"] > few["kilojoules"] > 0
    idle_kj = few["span_s"] * 2 * KIND.power.idle_mw / 1e6
    cap_kj = few["span_s"] * 2 * KIND.power.cap_mw / 1e6
    assert idle_kj < few["kilojoules"] < cap_kj


def test_shapes_repeat_with_their_seed() -> None:
    for name in SHAPES:
        first, again = (generate(name, conversations=30, seed=7) for _ in range(2))
        assert first == again
        assert first != generate(name, conversations=30, seed=8)

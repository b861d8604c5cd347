"""Replays: what is sent, what is seen, and what becomes of attempts that fail."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from typing import ClassVar

import httpx2
import pytest

from conserve_lab.emulator import EmulatedFleet
from conserve_lab.replay import (
    ConversationSample,
    Door,
    Pace,
    PromptWriter,
    Replay,
    TurnSample,
    choose_conversations,
    latencies,
    spread_of,
    tokens_per_word,
)
from conserve_lab.workloads import Conversation, Turn, WorkloadError

TRACE = (
    Conversation(
        conversation_id="one",
        turns=(Turn(append_tokens=200, output_tokens=5), Turn(append_tokens=40, output_tokens=3)),
        shared_tokens=64,
    ),
    Conversation(conversation_id="two", turns=(Turn(append_tokens=150, output_tokens=4),)),
)
ALL_AT_ONCE = Pace(arrivals_us=(0, 0), retry_s=0.01, give_up_s=0.0)
PATIENT = dataclasses.replace(ALL_AT_ONCE, give_up_s=60.0)


@pytest.fixture
async def door(fleet: EmulatedFleet) -> AsyncIterator[Door]:
    url = fleet.engine("d0").url
    async with httpx2.AsyncClient(base_url=f"{url}/v1", timeout=30, trust_env=False) as client:
        yield Door(client=client, model="emulated")


async def _writer(fleet: EmulatedFleet, salt: str = "salt") -> PromptWriter:
    ratio = await tokens_per_word(fleet.engine("d0").url, model="emulated")
    return PromptWriter(tokens_per_word=ratio, salt=salt)


class TestReplay:
    async def test_every_turn_has_its_size_and_finds_the_ones_before_it(self, fleet, door) -> None:
        ended: list[str] = []

        async def finish(name: str) -> None:
            ended.append(name)

        door = dataclasses.replace(door, finish=finish)
        one, two = await Replay(door=door, pace=PATIENT, writer=await _writer(fleet)).run(TRACE)
        assert [turn.completion_tokens for turn in one.turns] == [5, 3]
        assert [turn.last for turn in one.turns] == [False, True]
        assert one.turns[0].prompt_tokens == pytest.approx(200, rel=0.1)
        assert one.turns[1].cached_tokens >= 192  # the first turn, but for its last block
        assert one.ttfet_ms is not None
        assert two.ttfet_ms is not None
        assert sorted(ended) == ["one", "two"]
        assert [len(turn.token_gaps_us) for turn in one.turns] == [4, 2]

    async def test_what_all_share_is_found_by_the_second(self, fleet, door) -> None:
        turns = (Turn(append_tokens=200, output_tokens=1),)
        pair = [Conversation(conversation_id=name, turns=turns, shared_tokens=160) for name in "ab"]
        writer = await _writer(fleet)
        first = await Replay(door=door, pace=Pace(arrivals_us=(0,)), writer=writer).run(pair[:1])
        second = await Replay(door=door, pace=Pace(arrivals_us=(0,)), writer=writer).run(pair[1:])
        assert first[0].turns[0].cached_tokens == 0
        assert second[0].turns[0].cached_tokens >= 128

    async def test_a_failed_attempt_is_counted_and_asked_again(self, fleet, door) -> None:
        fleet.faults("d0", fail_next=1, fail_status=500)
        seen = await Replay(door=door, pace=PATIENT, writer=await _writer(fleet)).run(TRACE)
        failed = [turn for each in seen for turn in each.turns if turn.failures]
        assert [error for turn in failed for _, error in turn.failures] == ["HTTP 500"]
        assert failed[0].done_s is not None
        assert failed[0].attempt_s > failed[0].asked_s
        assert failed[0].ttft_ms is not None

    async def test_a_cut_stream_is_a_failed_attempt(self, fleet, door) -> None:
        fleet.faults("d0", drop_next=1, drop_after_chunks=2)
        seen = await Replay(door=door, pace=PATIENT, writer=await _writer(fleet)).run(TRACE)
        assert latencies(seen)["failed_attempts"] == 1
        assert all(turn.done_s is not None for each in seen for turn in each.turns)

    async def test_a_dead_engine_ends_conversations(self, fleet, door) -> None:
        writer = await _writer(fleet)
        fleet.kill("d0")
        seen = await Replay(door=door, pace=ALL_AT_ONCE, writer=writer).run(TRACE)
        assert all(each.given_up for each in seen)
        found = latencies(seen)
        assert found["given_up_conversations"] == 2
        assert found["ttfet_ms"]["p50"] is None


def test_figures_are_counted_from_the_turns_arrival() -> None:
    turn = TurnSample(conversation_id="a", turn=1, last=True, asked_s=1.0, attempt_s=3.0, first_token_s=3.5, done_s=4.0)
    turn.failures.append((2.0, "HTTP 500"))
    turn.token_gaps_us = [1_000, 3_000]
    found = latencies([ConversationSample(conversation_id="a", arrived_s=0.5, turns=[turn])])
    assert found["ttft_ms"]["p50"] == 2500.0
    assert found["ttfet_ms"]["p99"] == 3000.0
    assert found["tbt_ms"] == {"p50": 1.0, "p95": 3.0, "p99": 3.0}
    assert found["failed_turns"] == 1


def test_spread_is_the_ends_and_the_middle() -> None:
    assert spread_of([3.0, 1.0, 2.0]) == {"n": 3, "min": 1.0, "p50": 2.0, "max": 3.0}


def test_prompts_of_two_replays_share_nothing() -> None:
    texts = {PromptWriter(tokens_per_word=2, salt=salt).text("a", tokens=50)[:5] for salt in ("x-1", "y-1")}
    assert len(texts) == 2
    writer = PromptWriter(tokens_per_word=2, salt="x")
    assert writer.text("a", tokens=50) == writer.text("a", tokens=50) != writer.text("b", tokens=50)


class TestSelection:
    LIMITS: ClassVar = {"count": 2, "turns_max": 0, "output_tokens_max": 0, "context_tokens_max": 0, "seed": 1}

    def test_conversations_are_cut_to_what_fits(self, tmp_path) -> None:
        rows = [
            {"id": "long", "turns": [{"input_tokens_new": 900, "output_tokens": 5}]},
            {"id": "grows", "turns": [{"input_tokens_new": n, "output_tokens": 9} for n in (50, 400)]},
            {"id": "fits", "turns": [{"input_tokens_new": 10, "output_tokens": 5}]},
        ]
        path = tmp_path / "trace.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        chosen = choose_conversations(str(path), **(self.LIMITS | {"context_tokens_max": 300, "output_tokens_max": 4}))
        assert [each.conversation_id for each in chosen.conversations] == ["grows", "fits"]
        assert (chosen.cut, chosen.passed_over) == (1, 1)
        assert all(turn.output_tokens == 4 for each in chosen.conversations for turn in each.turns)

    def test_a_shape_is_generated(self) -> None:
        chosen = choose_conversations("coding", **(self.LIMITS | {"turns_max": 3}))
        assert [len(each.turns) for each in chosen.conversations] == [3, 3]

    @pytest.mark.parametrize(("trace", "limit", "says"), [("nowhere.jsonl", 0, "no trace"), ("coding", 5, "fits")])
    def test_what_cannot_be_replayed_says_so(self, trace, limit, says) -> None:
        with pytest.raises(WorkloadError, match=says):
            choose_conversations(trace, **(self.LIMITS | {"context_tokens_max": limit}))

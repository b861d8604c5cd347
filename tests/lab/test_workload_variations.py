"""Traces by name, TraceLab's rounds, shapes held to what was published, and ways to make a workload harder."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from conserve_lab.workloads import (
    TRACES_VARIABLE,
    Conversation,
    Turn,
    WorkloadError,
    generate,
    load_conversations,
    parse_variation,
    poisson_arrivals,
    short_name,
    trace_path,
    value_of,
    vary,
)


def _round(session: str, index: int, total: int, output: int, *tools_ms: float) -> dict[str, Any]:
    tools = [{"tool_name": "Bash", "tool_wall_latency_ms": each} for each in tools_ms]
    return {
        "session_id": session,
        "round_index": index,
        "input_tokens_total": total,
        "output_tokens": output,
        "tools": tools,
    }


def test_tracelab_rounds_are_turns_and_a_compacted_context_is_another_conversation(tmp_path: Path) -> None:
    rows = [
        _round("a", 1, 1_500, 50),
        _round("a", 0, 1_000, 100, 200.0, 700.5),
        _round("b", 0, 300, 0),
        _round("a", 2, 400, 20),
    ]
    path = tmp_path / "rounds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, other = load_conversations(path)
    assert first.turns == (
        Turn(append_tokens=1_000, output_tokens=100, gap_us=700_500),
        Turn(append_tokens=400, output_tokens=50),
    )
    assert second.turns == (Turn(append_tokens=400, output_tokens=20),)
    assert other.turns == (Turn(append_tokens=300, output_tokens=1),)
    path.write_text(json.dumps({"input_tokens_total": 5, "session_id": "a"}) + "\n")
    with pytest.raises(WorkloadError, match="session a: KeyError"):
        load_conversations(path)


def test_a_trace_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tau.public.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"turns": [{"input_tokens_new": 5, "output_tokens": 1}]}\n'))
    monkeypatch.delenv(TRACES_VARIABLE, raising=False)
    assert trace_path(str(path), folder=None) == path
    assert trace_path("tau", folder=tmp_path) == trace_path("tau.public", folder=tmp_path) == path
    with pytest.raises(WorkloadError, match=f"--traces or {TRACES_VARIABLE}"):
        trace_path("tau", folder=None)
    monkeypatch.setenv(TRACES_VARIABLE, str(tmp_path))
    assert trace_path("tau", folder=None) == path
    with pytest.raises(WorkloadError, match=r"no trace 'other' in .*: it holds tau"):
        trace_path("other", folder=None)
    assert short_name(str(path)) == "tau"
    assert short_name("coding") == "coding"


PUBLISHED = {
    # shape: first turn's median, append's median and 90th percentile, output's median; of the public traces
    "swe-padded": (15_908, 67, 67, 122),
    "coding": (2_088, 261, 1_536, 85),
    "mini-swe": (1_541, 40, 664, 108),
    "deep-coding": (17_575, 896, 5_151, 156),
    "service": (4_035, 36, 399, 57),
    "giant-appends": (3_980, 33, 1_628, 36),
    "chat": (6_062, 26, None, 350),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_shapes_have_the_published_statistics(name: str) -> None:
    conversations = generate(name, conversations=1_500, seed=4)
    first = sorted(each.turns[0].append_tokens for each in conversations)
    appends = sorted(turn.append_tokens for each in conversations for turn in each.turns[1:])
    outputs = sorted(turn.output_tokens for each in conversations for turn in each.turns)
    found = (
        first[len(first) // 2],
        appends[len(appends) // 2],
        appends[len(appends) * 9 // 10],
        outputs[len(outputs) // 2],
    )
    for value, told in zip(found, PUBLISHED[name], strict=True):
        assert told is None or value == pytest.approx(told, rel=0.25), (found, PUBLISHED[name])


BASE = tuple(
    Conversation(conversation_id=f"c{n}", turns=tuple(Turn(append_tokens=500, output_tokens=40) for _ in range(4)))
    for n in range(200)
)


def test_variations_change_what_they_say_and_repeat_with_their_seed() -> None:
    slow = vary(BASE, ["tools=2"], seed=1)
    gaps = sorted(turn.gap_us for each in slow for turn in each.turns)
    assert 1_600_000 < gaps[len(gaps) // 2] < 2_400_000
    assert slow == vary(BASE, ["tools=2"], seed=1) != vary(BASE, ["tools=2"], seed=2)
    assert {each.shared_tokens for each in vary(BASE, ["shared=300"], seed=1)} == {300}
    assert {each.shared_tokens for each in vary(BASE, ["shared=9000"], seed=1)} == {500}
    giants = [turn.append_tokens > 20_000 for each in vary(BASE, ["giant=0.1"], seed=1) for turn in each.turns[1:]]
    assert 0.06 < sum(giants) / len(giants) < 0.14
    skewed = [each.turns[0].output_tokens for each in vary(BASE, ["skew=5"], seed=1)]
    assert set(skewed) == {40, 200}
    assert 8 < skewed.count(200) < 35
    assert vary(BASE, ["burst=4", "fail=10"], seed=1) == BASE, "those are the run's"
    assert value_of(["burst=4", "fail=10", "fail=20"], "fail") == [10.0, 20.0]


@pytest.mark.parametrize("text", ["nope=1", "tools", "tools=", "tools=-1", "tools=much", "tools=nan"])
def test_a_variation_that_is_none_is_named(text: str) -> None:
    with pytest.raises(WorkloadError, match="write NAME=NUMBER"):
        parse_variation(text)


def test_bursts_keep_the_rate() -> None:
    bursts = list(poisson_arrivals(4_000, per_s=2.0, seed=1, burst=4))
    assert len(set(bursts)) == 1_000
    assert 1_700 < bursts[-1] / 1e6 < 2_300

"""Loaders read what others publish, and say what is wrong with what they cannot read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from conserve_lab.workloads import Conversation, Turn, WorkloadError, generate, load_conversations, poisson_arrivals


def _write(path: Path, *rows: Any) -> Path:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["sizes.jsonl", "sizes.jsonl.gz"])
def test_sizes(tmp_path: Path, name: str) -> None:
    row = {
        "id": "a",
        "shared_prefix_tokens": 40,
        "turns": [
            {"input_tokens_new": 100, "output_tokens": 5, "tool_seconds": 0.5},
            {"input_tokens_new": 0, "output_tokens": 7, "tool_seconds": None, "gap_s": 2},
        ],
    }
    (found,) = load_conversations(_write(tmp_path / name, row))
    assert found == Conversation(
        conversation_id="a",
        shared_tokens=40,
        turns=(
            Turn(append_tokens=100, output_tokens=5, gap_us=500_000),
            Turn(append_tokens=1, output_tokens=7, gap_us=2_000_000),
        ),
    )
    assert [found.prompt_tokens(0), found.prompt_tokens(1), found.final_tokens] == [100, 106, 113]
    assert found.first(1).final_tokens == 105


def test_openai_messages_end_a_turn_with_each_answer(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "s" * 400},
        {"role": "user", "content": [{"type": "text", "text": "u" * 80}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "t" * 40},
        {"role": "assistant", "content": "done"},
    ]
    (found,) = load_conversations(_write(tmp_path / "m.jsonl", {"messages": messages, "tools": [{"name": "f"}]}))
    assert len(found.turns) == 2
    assert found.turns[0].append_tokens > 120
    assert found.turns[1].append_tokens == 14


def test_request_lines_of_one_session_are_its_turns(tmp_path: Path) -> None:
    rows = [
        {"session_id": "s", "input_length": 100, "output_length": 10},
        {"input_length": 50, "output_length": 5, "timestamp": 3},
        {"session_id": "s", "input_length": 130, "output_length": 10, "delay": 250},
    ]
    session, single = load_conversations(_write(tmp_path / "r.jsonl", *rows))
    assert [turn.append_tokens for turn in session.turns] == [100, 20]
    assert session.turns[1].gap_us == 250_000
    assert len(single.turns) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no conversation"),
        ("nonsense\n", "is not JSON"),
        ("[1]\n", "is not an object"),
        ('{"foo": 1}\n', "neither `turns` nor `messages`"),
        ('{"turns": [{"output_tokens": 1}]}\n', "KeyError"),
        ('{"turns": []}\n', "no turns"),
        ('{"input_length": "many", "output_length": 1}\n', "ValueError"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=said):
        load_conversations(path)


def test_impossible_conversations_are_refused() -> None:
    with pytest.raises(WorkloadError, match="at least one token"):
        Turn(append_tokens=0, output_tokens=1)
    with pytest.raises(WorkloadError, match="shares more"):
        Conversation(conversation_id="c", turns=(Turn(append_tokens=5, output_tokens=1),), shared_tokens=6)
    with pytest.raises(WorkloadError, match="no workload 'nope'"):
        generate("nope", conversations=1, seed=1)


def test_arrivals_have_the_asked_rate_and_repeat() -> None:
    first = list(poisson_arrivals(4_000, per_s=2.0, seed=1))
    assert first == list(poisson_arrivals(4_000, per_s=2.0, seed=1)) == sorted(first)
    assert 1_800 < first[-1] / 1e6 < 2_200
    assert first != list(poisson_arrivals(4_000, per_s=2.0, seed=2))

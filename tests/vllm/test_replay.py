"""`conserve bench replay` on real engines: real prefills, real transfers, counted by vLLM itself."""

from __future__ import annotations

import dataclasses
import json

import pytest
from rich.console import Console

from conserve_lab.live import trial
from conserve_lab.live.engines import engines_of_broker
from conserve_lab.live.policy import Policy
from conserve_lab.live.replay_command import ReplayRun, run_replay
from conserve_lab.replay import Chosen
from conserve_lab.workloads import Conversation, Turn

from .leased import Stage
from .raw import Json

TURNS = 3
TRACE = tuple(
    Conversation(
        conversation_id=f"replayed-{number}",
        turns=tuple(Turn(append_tokens=400 if turn == 0 else 80, output_tokens=8) for turn in range(TURNS)),
    )
    for number in range(2)
)
RUN = ReplayRun(
    policies=(Policy.CONSERVE,),
    chosen=Chosen(trace="here", conversations=TRACE, cut=0, passed_over=0),
    per_s=2.0,
)


@pytest.mark.parametrize(
    ("policy", "prefills"),
    [(Policy.CONSERVE, len(TRACE)), (Policy.PER_TURN, len(TRACE) * TURNS)],
    ids=["once a conversation", "once a turn"],
)
def test_a_trace_is_replayed_on_real_engines(
    stage: Stage, tmp_path, monkeypatch: pytest.MonkeyPatch, policy: Policy, prefills: int
) -> None:
    monkeypatch.setattr(trial, "IDLE_S", 0.01)
    broker = stage.broker(preset="paper")
    run = dataclasses.replace(RUN, policies=(policy,), broker_url=broker.url)
    fleet = engines_of_broker(broker.url)
    found = _replayed(run, fleet, tmp_path / "replay.json")
    assert found["prefill_requests"] == found["transfers"] == prefills
    assert (found["turns"], found["failed_turns"], found["failed_transfers"]) == (len(TRACE) * TURNS, 0, 0)
    assert found["output_tokens"] == len(TRACE) * TURNS * 8
    assert found["transferred_tokens"] > 0
    # Nothing is computed twice but for the last token of a transferred prompt and blocks that were not full.
    assert found["computed_prompt_tokens"] < found["prompt_tokens"]


def _replayed(run: ReplayRun, fleet, path) -> Json:
    assert run_replay(run, fleet, json_path=path, console=Console(quiet=True)) == 0
    (found,) = json.loads(path.read_text())
    return found

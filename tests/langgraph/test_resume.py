"""Threads that go on elsewhere: another model object, another process, with checkpoints in memory and in SQLite."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack
from conserve_langgraph import ConServeChat
from conserve_sdk import ConServe
from conserve_sdk.protocol import FleetInfo
from conserve_sdk.telemetry import TurnCollector

LONG = "Here is the listing of the repository. " * 60
PROGRAM = Path(__file__).with_name("resumed_elsewhere.py")


def _config() -> Any:
    return {"configurable": {"thread_id": f"resume-{uuid4().hex[:10]}"}}


def _turn(text: str) -> Any:
    return {"messages": [HumanMessage(LONG + text)]}


def _run(stack: LocalStack, saver: BaseCheckpointSaver[Any], config: Any, text: str) -> TurnCollector:
    """One run with a model object and connections of its own, as in another process."""
    turns = TurnCollector()
    with ConServe(stack.broker_url, on_turn=turns) as conserve:
        llm = ConServeChat(model=stack.model, conserve=conserve)
        create_agent(llm, [], checkpointer=saver).invoke(_turn(text), config)
    return turns


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_another_model_object_finds_the_lease(stack: LocalStack, tmp_path: Path, kind: str) -> None:
    config = _config()
    if kind == "memory":
        saver = InMemorySaver()
        first, second = (_run(stack, saver, config, text) for text in ("One.", "Two."))
    else:
        runs = []
        for text in ("One.", "Two."):  # the file is opened anew each time
            with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.db")) as sqlite:
                runs.append(_run(stack, sqlite, config, text))
        first, second = runs
    (one,), (two,) = first.records, second.records
    assert (one.lease_id, one.decoder_id) == (two.lease_id, two.decoder_id)
    assert (one.migrated, two.migrated) == (True, False)
    assert two.cached_tokens > 0.8 * one.prompt_tokens


async def test_async_sqlite(stack: LocalStack, tmp_path: Path) -> None:
    config, turns = _config(), TurnCollector()
    for text in ("One.", "Two."):
        async with (
            AsyncSqliteSaver.from_conn_string(str(tmp_path / "checkpoints.db")) as saver,
            ConServe(stack.broker_url, on_turn=turns) as conserve,
        ):
            llm = ConServeChat(model=stack.model, conserve=conserve)
            await create_agent(llm, [], checkpointer=saver).ainvoke(_turn(text), config)
    assert len({record.lease_id for record in turns.records}) == 1
    assert [record.migrated for record in turns.records] == [True, False]


def _elsewhere(stack: LocalStack, checkpoints: Path, thread: str, step: str) -> Any:
    done = subprocess.run(
        [sys.executable, PROGRAM, stack.broker_url, checkpoints, thread, step],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(600)  # four interpreters start
@pytest.mark.parametrize("pause", ["short", "long"])
def test_an_interrupt_answered_in_another_process(
    tmp_path: Path, pause: str, until: Callable[[Callable[[], bool]], None]
) -> None:
    """After a short pause the lease is still there; after a long one the turn is a first turn again."""
    fleet = default_fleet(time_scale=0.0, tool_calls_min=1, tool_calls_max=1)
    park_ttl_ms = 600_000 if pause == "short" else 1_000
    lease = {"ttl_ms": 600_000, "park_ttl_ms": park_ttl_ms, "grace_ms": 0}
    with LocalStack(fleet=fleet, preset="paper", settings={"lease": lease}) as stack:
        asked = _elsewhere(stack, tmp_path / "checkpoints.db", "ticket", "ask")
        assert asked["waits"]

        def leases() -> int:
            return FleetInfo.model_validate_json(httpx2.get(f"{stack.broker_url}/v1/fleet", timeout=30).content).leases

        if pause == "long":
            until(lambda: leases() == 0)
        answered = _elsewhere(stack, tmp_path / "checkpoints.db", "ticket", "answer")
    assert not answered["waits"]
    (before,), (after,) = asked["turns"], answered["turns"]
    assert before["migrated"]
    assert after["migrated"] == (pause == "long")
    assert (after["lease"] == before["lease"]) == (pause == "short")

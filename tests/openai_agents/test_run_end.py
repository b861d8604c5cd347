"""What becomes of the leases when a run of the real Runner returns, raises, or stops for an approval."""

import asyncio
import json
import subprocess
import sys

import pytest
from agents import (
    Agent,
    MaxTurnsExceeded,
    Runner,
    RunResult,
    RunState,
    SQLiteSession,
    function_tool,
    handoff,
)

from conserve_lab.stack import LocalStack
from conserve_openai_agents import ConServeModelProvider, _runs
from conserve_sdk import ConServe
from conserve_sdk.telemetry import TurnCollector

from .conftest import Activity, Config

LONG = "You keep the files of an office in order. " * 100


@function_tool
def look_up(name: str) -> str:
    """Look up a file."""
    return f"{name}: 3 pages"


@function_tool(needs_approval=True)
def delete_file(name: str) -> str:
    """Delete a file."""
    return f"deleted {name}"


def _clerk(*tools: object, **more: object) -> Agent[None]:
    return Agent(name="clerk", instructions=LONG, tools=list(tools or [look_up]), **more)  # type: ignore[arg-type]


def _careful() -> Agent[None]:
    return _clerk(delete_file)


def _renewed(conserve: ConServe) -> bool:
    """Whether this process goes on to renew any lease."""
    kit = conserve._runtime.kit
    return kit.registry.next_renewal_ms(now_ms=kit.now_ms()) is not None


async def _approve_all(result: RunResult, agent: Agent[None], **options: object) -> RunResult:
    while result.interruptions:
        state = result.to_state()
        for item in result.interruptions:
            state.approve(item)
        result = await Runner.run(agent, state, **options)  # type: ignore[arg-type]
    return result


async def test_a_run_of_its_own_gives_its_lease_back(
    provider: ConServeModelProvider, turns: TurnCollector, config: Config, activity: Activity
) -> None:
    async with provider.conserve:
        await Runner.run(_clerk(), "Look up the lease.", run_config=config(), max_turns=20)
        assert {activity(record.lease_id) for record in turns.records} == {"gone"}


async def test_a_streamed_run_of_its_own_does_too(
    provider: ConServeModelProvider, turns: TurnCollector, config: Config, activity: Activity
) -> None:
    async with provider.conserve:
        streamed = Runner.run_streamed(_clerk(), "Look up the lease.", run_config=config(), max_turns=20)
        async for _ in streamed.stream_events():
            pass
        assert {activity(record.lease_id) for record in turns.records} == {"gone"}


async def test_a_session_keeps_its_lease_which_is_renewed_no_more(
    provider: ConServeModelProvider, turns: TurnCollector, config: Config, activity: Activity, session: SQLiteSession
) -> None:
    """The first agent's last turn called a tool (the hand-off): without a word its lease would be renewed for long."""
    async with provider.conserve:
        expert = Agent(name="expert", instructions="You know it all. " + LONG, handoff_description="knows")
        desk = Agent(name="desk", instructions="You hand over. " + LONG, handoffs=[handoff(expert)])
        result = await Runner.run(desk, "Transfer to expert.", session=session, run_config=config(), max_turns=20)
        assert result.last_agent is expert
        assert len({record.conversation_id for record in turns.records}) == 1
        assert len({record.lineage for record in turns.records}) == 2
        assert provider.conserve.flush(60)
        assert {activity(record.lease_id) for record in turns.records} == {"idle"}
        assert not _renewed(provider.conserve)


async def test_an_open_approval_parks_and_its_resumption_goes_on(
    provider: ConServeModelProvider, turns: TurnCollector, config: Config, activity: Activity
) -> None:
    async with provider.conserve:
        first = await Runner.run(_careful(), "Delete file a.", run_config=config(), max_turns=20)
        assert first.interruptions
        lease_id = turns.records[0].lease_id
        assert activity(lease_id) == "parked"
        assert not _renewed(provider.conserve)
        last = await _approve_all(first, _careful(), run_config=config(), max_turns=20)
        assert last.final_output
        assert {record.lease_id for record in turns.records} == {lease_id}
        assert [record.migrated for record in turns.records] == [True] + [False] * (len(turns.records) - 1)
        assert activity(lease_id) == "gone"


async def test_streamed_runs_park_too(
    provider: ConServeModelProvider, turns: TurnCollector, config: Config, activity: Activity, session: SQLiteSession
) -> None:
    async with provider.conserve:
        streamed = Runner.run_streamed(_careful(), "Delete file a.", session=session, run_config=config())
        async for _ in streamed.stream_events():
            pass
        assert streamed.interruptions
        assert activity(turns.records[0].lease_id) == "parked"


RESUME = """
import asyncio, json, sys
from agents import Agent, RunConfig, Runner, RunState, function_tool
from conserve_openai_agents import ConServeModelProvider
from conserve_sdk import ConServe
from conserve_sdk.telemetry import TurnCollector

@function_tool(needs_approval=True)
def delete_file(name: str) -> str:
    "Delete a file."
    return f"deleted {name}"

async def main(url, model, instructions, state):
    turns = TurnCollector()
    async with ConServe(url, on_turn=turns) as conserve:
        provider = ConServeModelProvider(conserve=conserve, default_model=model)
        config = RunConfig(model_provider=provider, tracing_disabled=True)
        agent = Agent(name="clerk", instructions=instructions, tools=[delete_file])
        state = await RunState.from_json(agent, state)
        for item in state.get_interruptions():
            state.approve(item)
        await Runner.run(agent, state, run_config=config, max_turns=20)
    print(json.dumps([[r.lease_id, r.conversation_id, r.first_turn, r.migrated, r.error] for r in turns.records]))

asyncio.run(main(*json.load(sys.stdin)))
"""


@pytest.mark.parametrize("meanwhile", ["in time", "too late"])
async def test_another_process_resumes(
    stack: LocalStack, provider: ConServeModelProvider, turns: TurnCollector, config: Config, meanwhile: str
) -> None:
    async with provider.conserve:
        parked = await Runner.run(_careful(), "Delete file a.", run_config=config(), max_turns=20)
        first = turns.records[0]
        if meanwhile == "too late":
            assert await provider.conserve.arelease(first.conversation_id) == 1
        given = json.dumps([stack.broker_url, stack.model, LONG, parked.to_state().to_json()])
        command = [sys.executable, "-c", RESUME]
        done = await asyncio.to_thread(
            subprocess.run, command, input=given, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    (lease_id, conversation, first_turn, migrated, error), *_ = json.loads(done.stdout.splitlines()[-1])
    assert (conversation, error) == (first.conversation_id, "")
    if meanwhile == "in time":
        assert (lease_id, first_turn, migrated) == (first.lease_id, False, False)
    else:
        assert (lease_id != first.lease_id, first_turn, migrated) == (True, True, True)


async def test_a_state_survives_the_trip_without_losing_its_conversation(
    provider: ConServeModelProvider, config: Config
) -> None:
    """The runner keeps the key of a run in its state: where that goes, a resumed run is a new conversation."""
    async with provider.conserve:
        parked = await Runner.run(_careful(), "Delete file a.", run_config=config(), max_turns=20)
        state = await RunState.from_string(_careful(), parked.to_state().to_string())
        key = getattr(state, "_generated_prompt_cache_key", None)
        assert str(key).startswith("agents-sdk:run:"), (
            "openai-agents no longer keeps the generated key in RunState: have resumed runs named by group_id or "
            "session, and say so in the README"
        )


async def test_an_agent_used_as_a_tool_that_waits_parks_the_run_around_it(
    provider: ConServeModelProvider, turns: TurnCollector, config: Config, activity: Activity
) -> None:
    async with provider.conserve:
        boss = Agent(
            name="boss",
            instructions="You delegate. " + LONG,
            tools=[_careful().as_tool("clerk", "Deletes a file.", run_config=config())],
        )
        result = await Runner.run(boss, "Clerk, delete file a.", run_config=config(), max_turns=20)
        assert result.interruptions
        assert len({record.conversation_id for record in turns.records}) == 2
        assert {activity(record.lease_id) for record in turns.records} == {"parked"}
        last = await _approve_all(result, boss, run_config=config(), max_turns=20)
        assert last.final_output
        assert {activity(record.lease_id) for record in turns.records} == {"gone"}


async def test_a_tool_whose_result_is_the_answer_ends_the_run(
    provider: ConServeModelProvider, turns: TurnCollector, config: Config, activity: Activity
) -> None:
    async with provider.conserve:
        agent = _clerk(look_up, tool_use_behavior="stop_on_first_tool")
        result = await Runner.run(agent, "Look up the lease.", run_config=config())
        assert "3 pages" in result.final_output
        assert activity(turns.records[-1].lease_id) == "gone"


async def test_a_run_that_raises_is_over(
    provider: ConServeModelProvider, turns: TurnCollector, config: Config, activity: Activity
) -> None:
    async with provider.conserve:
        with pytest.raises(MaxTurnsExceeded):
            await Runner.run(_clerk(), "Look up the lease.", run_config=config(), max_turns=1)
        assert activity(turns.records[-1].lease_id) == "gone"


async def test_a_broker_that_does_not_answer_holds_no_run_up(
    provider: ConServeModelProvider, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def silence(_conversation: str) -> int:
        await asyncio.sleep(3_600)
        return 0

    async with provider.conserve:
        monkeypatch.setattr(provider.conserve, "arelease", silence)
        monkeypatch.setattr(_runs, "GOODBYE_S", 0.05)
        with caplog.at_level("INFO", logger="conserve_openai_agents"):
            result = await Runner.run(_clerk(), "Look up the lease.", run_config=config(), max_turns=20)
    assert result.final_output
    assert "run_end_untold" in caplog.text


def test_runs_in_several_event_loops(
    provider: ConServeModelProvider, turns: TurnCollector, config: Config, activity: Activity, session: SQLiteSession
) -> None:
    async def one() -> None:
        await Runner.run(_clerk(), "Look up the lease.", session=session, run_config=config(), max_turns=20)

    for _ in range(3):
        asyncio.run(one())
    assert provider.conserve.flush(60)
    assert len({record.lease_id for record in turns.records}) == 1
    assert sum(record.migrated for record in turns.records) == 1
    assert activity(turns.records[0].lease_id) == "idle"

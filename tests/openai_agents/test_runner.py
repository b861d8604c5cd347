"""The real Runner of the Agents SDK over a broker and emulated engines."""

from collections import Counter
from uuid import uuid4

import pytest
from agents import Agent, RunConfig, Runner, SQLiteSession, function_tool

from conserve_lab.stack import LocalStack
from conserve_openai_agents import ConServeModel, ConServeModelProvider
from conserve_sdk import ConServe, conversation
from conserve_sdk.telemetry import TurnCollector

LONG = "You keep the books of a shop and answer briefly. " * 100


@function_tool
def add(left: int, right: int) -> int:
    """Add two whole numbers."""
    return left + right


def _clerk() -> Agent[None]:
    return Agent(name="clerk", instructions=LONG, tools=[add])


def _config(provider: ConServeModelProvider, **more: object) -> RunConfig:
    return RunConfig(model_provider=provider, tracing_disabled=True, **more)  # type: ignore[arg-type]


async def test_runs_of_a_session_are_turns_of_one_lease(
    provider: ConServeModelProvider, turns: TurnCollector, session: SQLiteSession
) -> None:
    async with provider.conserve:
        for question in ("Add 1 and 2.", "Add 3 to that.", "And 4?"):
            result = await Runner.run(_clerk(), question, session=session, run_config=_config(provider), max_turns=20)
            assert result.final_output
        streamed = Runner.run_streamed(_clerk(), "And 5?", session=session, run_config=_config(provider), max_turns=20)
        events = [event async for event in streamed.stream_events()]
        assert events
        assert streamed.final_output
        records = turns.records
        assert len(records) >= 8
        assert len({record.conversation_id for record in records}) == 1
        assert records[0].conversation_id.startswith("agents-sdk:session:")
        assert len({(record.lease_id, record.decoder_id) for record in records}) == 1
        assert [record.migrated for record in records] == [True] + [False] * (len(records) - 1)


async def test_without_a_session_each_run_is_its_own_conversation(
    provider: ConServeModelProvider, turns: TurnCollector
) -> None:
    async with provider.conserve:
        for _ in range(2):
            await Runner.run(_clerk(), "Add 1 and 2.", run_config=_config(provider), max_turns=20)
        assert len({record.conversation_id for record in turns.records}) == 2
        assert all(record.conversation_id.startswith("agents-sdk:run:") for record in turns.records)


async def test_group_of_a_run_is_its_conversation(provider: ConServeModelProvider, turns: TurnCollector) -> None:
    async with provider.conserve:
        for _ in range(2):
            await Runner.run(
                _clerk(), "Add 1 and 2.", run_config=_config(provider, group_id=f"g-{id(turns)}"), max_turns=20
            )
        assert len({record.conversation_id for record in turns.records}) == 1


async def test_block_wins_over_the_session(
    provider: ConServeModelProvider, turns: TurnCollector, session: SQLiteSession
) -> None:
    async with provider.conserve:
        name = f"block-{uuid4().hex[:8]}"
        with conversation(name):
            await Runner.run(_clerk(), "Add.", session=session, run_config=_config(provider), max_turns=20)
        assert {record.conversation_id for record in turns.records} == {name}


async def test_agent_as_tool_has_its_own_conversation(
    provider: ConServeModelProvider, turns: TurnCollector, stack: LocalStack, session: SQLiteSession
) -> None:
    async with provider.conserve:
        model = ConServeModel(stack.model, conserve=provider.conserve)
        worker = Agent(name="worker", instructions="You work. " + LONG, model=model)
        boss = Agent(
            name="boss",
            instructions="You delegate. " + LONG,
            model=model,
            tools=[worker.as_tool("work", "Do the work.")],
        )
        result = await Runner.run(boss, "Get it done.", session=session, run_config=_config(provider), max_turns=20)
        assert result.final_output
        kinds = Counter(record.conversation_id.split(":")[1] for record in turns.records)
        assert set(kinds) == {"session", "run"}


def test_provider_keeps_one_model_a_name_and_wants_a_name(conserve: ConServe) -> None:
    provider = ConServeModelProvider(conserve=conserve)
    assert provider.get_model("a") is provider.get_model("a")
    with pytest.raises(ValueError, match="names no model"):
        provider.get_model(None)

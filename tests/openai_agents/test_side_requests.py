"""Guardrails and other small runs beside a conversation: where they know it, they ride on its decoder."""

from uuid import uuid4

from agents import Agent, GuardrailFunctionOutput, InputGuardrail, Runner, SQLiteSession, function_tool

from conserve_openai_agents import ConServeModelProvider
from conserve_sdk import conversation
from conserve_sdk.protocol import LeaseRequest
from conserve_sdk.telemetry import TurnCollector

from .conftest import Activity, Config

LONG = "You keep the files of an office in order. " * 100
JUDGE = Agent(name="judge", instructions="Say whether this is polite.")


async def test_a_small_run_inside_a_tool_rides_without_a_lease(
    provider: ConServeModelProvider, turns: TurnCollector, config: Config, session: SQLiteSession
) -> None:
    asked = iter(range(100))

    @function_tool
    async def look_up(name: str) -> str:
        """Look up a file."""
        verdict = await Runner.run(JUDGE, f"{next(asked)}: is {name} a polite name?", run_config=config())
        return str(verdict.final_output)

    async with provider.conserve:
        clerk = Agent(name="clerk", instructions=LONG, tools=[look_up])
        await Runner.run(clerk, "Look up a.", session=session, run_config=config(), max_turns=20)
        small = [record for record in turns.records if record.lease_id is None]
        large = [record for record in turns.records if record.lease_id is not None]
        assert len(small) >= 2
        assert {record.decoder_id for record in small} == {large[0].decoder_id}
        assert {record.conversation_id for record in turns.records} == {large[0].conversation_id}


async def test_a_long_run_inside_a_tool_has_a_conversation_of_its_own(
    provider: ConServeModelProvider,
    turns: TurnCollector,
    config: Config,
    activity: Activity,
    asked: list[LeaseRequest],
    session: SQLiteSession,
) -> None:
    @function_tool
    async def look_up(name: str) -> str:
        """Look up a file."""
        reader = Agent(name="reader", instructions="You read. " + LONG)
        return str((await Runner.run(reader, name, run_config=config())).final_output)

    async with provider.conserve:
        clerk = Agent(name="clerk", instructions=LONG, tools=[look_up])
        await Runner.run(clerk, "Look up a.", session=session, run_config=config(), max_turns=20)
        own = [record for record in turns.records if record.conversation_id.startswith("agents-sdk:run:")]
        assert len({record.conversation_id for record in own}) == len(own) >= 2
        assert {activity(record.lease_id) for record in own} == {"gone"}
        outer = next(record for record in turns.records if record not in own)
        parents = [request.parent_lease_id for request in asked if request.conversation_id != outer.conversation_id]
        assert parents == [outer.lease_id] * len(own), "a child's lease names its parent's"


async def test_a_guardrail_inside_a_block_rides_once_the_conversation_has_a_lease(
    provider: ConServeModelProvider, turns: TurnCollector, config: Config
) -> None:
    async def polite(_context, _agent, text) -> GuardrailFunctionOutput:
        verdict = await Runner.run(JUDGE, str(text)[:200], run_config=config())
        return GuardrailFunctionOutput(output_info=verdict.final_output, tripwire_triggered=False)

    async with provider.conserve:
        clerk = Agent(name="clerk", instructions=LONG, input_guardrails=[InputGuardrail(polite)])
        with conversation(f"block-{uuid4().hex}"):
            await Runner.run(clerk, "Hello.", run_config=config())
            turns.clear()
            await Runner.run(clerk, "Hello again.", run_config=config())
        assert sorted(record.lease_id is None for record in turns.records) == [False, True]


async def test_a_guardrail_that_nothing_names_gives_its_lease_back_at_once(
    provider: ConServeModelProvider, turns: TurnCollector, config: Config, activity: Activity, session: SQLiteSession
) -> None:
    async def polite(_context, _agent, text) -> GuardrailFunctionOutput:
        verdict = await Runner.run(JUDGE, str(text)[:200], run_config=config())
        return GuardrailFunctionOutput(output_info=verdict.final_output, tripwire_triggered=False)

    async with provider.conserve:
        clerk = Agent(name="clerk", instructions=LONG, input_guardrails=[InputGuardrail(polite)])
        await Runner.run(clerk, "Hello.", session=session, run_config=config())
        assert provider.conserve.flush(60)
        states = {record.conversation_id.split(":")[1]: activity(record.lease_id) for record in turns.records}
        assert states == {"session": "idle", "run": "gone"}

"""The same runs over the engines' Responses API."""

from agents import Agent, RunConfig, Runner, SQLiteSession, function_tool

from conserve_lab.stack import LocalStack
from conserve_openai_agents import ConServeModelProvider, ConServeResponsesModel
from conserve_sdk import ConServe
from conserve_sdk.telemetry import TurnCollector

from .conftest import Activity

LONG = "You keep the files of an office in order. " * 100


@function_tool
def look_up(name: str) -> str:
    """Look up a file."""
    return f"{name}: 3 pages"


async def test_a_session_over_the_responses_api(
    stack: LocalStack, conserve: ConServe, turns: TurnCollector, activity: Activity, session: SQLiteSession
) -> None:
    async with conserve:
        provider = ConServeModelProvider(conserve=conserve, default_model=stack.model, use_responses=True)
        assert isinstance(provider.get_model(None), ConServeResponsesModel)
        config = RunConfig(model_provider=provider, tracing_disabled=True)
        agent = Agent(name="clerk", instructions=LONG, tools=[look_up])
        result = await Runner.run(agent, "Look up a.", session=session, run_config=config, max_turns=20)
        assert result.final_output
        streamed = Runner.run_streamed(agent, "Look up b.", session=session, run_config=config, max_turns=20)
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output
        records = turns.records
        assert {record.path for record in records} == {"/v1/responses"}
        assert len({(record.lease_id, record.decoder_id) for record in records}) == 1
        assert [record.migrated for record in records] == [True] + [False] * (len(records) - 1)
        await Runner.run(agent, "Look up c.", run_config=config, max_turns=20)
        assert activity(records[0].lease_id) == "idle"
        assert activity(turns.records[-1].lease_id) == "gone"

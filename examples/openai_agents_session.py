"""The OpenAI Agents SDK with a session: two runs of one session are turns of one leased conversation.

conserve demo --serve &
CONSERVE_BROKER_URL=http://127.0.0.1:7070 python examples/openai_agents_session.py
"""

import asyncio
import os
from contextlib import closing

from agents import Agent, RunConfig, Runner, SQLiteSession, function_tool

from conserve_openai_agents import ConServeModelProvider

MODEL = os.environ.get("CONSERVE_MODEL", "emulated")


@function_tool
def add(left: int, right: int) -> int:
    """Add two whole numbers."""
    return left + right


async def main() -> None:
    provider = ConServeModelProvider(default_model=MODEL)  # the broker's address comes from CONSERVE_BROKER_URL
    config = RunConfig(model_provider=provider, tracing_disabled=True)
    agent = Agent(name="clerk", instructions="Use the tool, then answer in one sentence.", tools=[add])
    with closing(SQLiteSession("example-agents")) as session:
        for question in ("What is 19 + 23?", "Is that more than 40?"):
            result = await Runner.run(agent, question, session=session, run_config=config, max_turns=20)
            print(f"{question} {result.final_output}")


if __name__ == "__main__":
    asyncio.run(main())

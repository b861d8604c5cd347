"""A tool that a person must approve, with the OpenAI Agents SDK. While it waits, no engine keeps the KV cache.

The state of the run goes to a file, as it would between two processes of a service; the second half finds the lease
again if the person is quick, and starts with a first turn if not.

conserve demo --serve &
CONSERVE_BROKER_URL=http://127.0.0.1:7070 python examples/openai_agents_approval.py
"""

import asyncio
import os
import tempfile
from contextlib import closing
from pathlib import Path

from agents import Agent, RunConfig, Runner, RunState, SQLiteSession, function_tool

from conserve_openai_agents import ConServeModelProvider

MODEL = os.environ.get("CONSERVE_MODEL", "emulated")


@function_tool(needs_approval=True)
def delete_file(name: str) -> str:
    """Delete a file."""
    return f"deleted {name}"


AGENT = Agent(name="clerk", instructions="Delete what you are told to delete.", tools=[delete_file])


async def ask(config: RunConfig, session: SQLiteSession) -> str:
    result = await Runner.run(AGENT, "Delete file `draft.txt`.", session=session, run_config=config, max_turns=20)
    for call in result.interruptions:
        print(f"waits for approval: {call.name} {call.arguments}")
    return result.to_state().to_string()


async def approve(text: str, config: RunConfig, session: SQLiteSession) -> str:
    state = await RunState.from_string(AGENT, text)
    for call in state.get_interruptions():
        state.approve(call, always_approve=True)
    result = await Runner.run(AGENT, state, session=session, run_config=config, max_turns=20)
    return str(result.final_output)


def main() -> None:
    provider = ConServeModelProvider(default_model=MODEL)  # the broker's address comes from CONSERVE_BROKER_URL
    config = RunConfig(model_provider=provider, tracing_disabled=True)
    with closing(SQLiteSession("example-approval")) as session, tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "run.json")
        checkpoint.write_text(asyncio.run(ask(config, session)), "utf-8")
        print(f"approved: {asyncio.run(approve(checkpoint.read_text('utf-8'), config, session))}")


if __name__ == "__main__":
    main()

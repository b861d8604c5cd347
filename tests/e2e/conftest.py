"""Agents on a whole stack, and what their conversations look like when nothing goes wrong."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conserve_lab.demo.agent import Agent, AgentRun, build_agent, run_agents
from conserve_lab.demo.tasks import Task, make_tasks
from conserve_lab.demo.tools import Toolbox
from conserve_lab.demo.workspace import Workspace
from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack
from conserve_langgraph import ConServeChat
from conserve_sdk import ConServe
from conserve_sdk.telemetry import TurnCollector, TurnRecord

CONVERSATIONS = 6


class Crew:
    """Runs the same agents again and again; a hook may break something in the middle."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rounds = 0
        self.tasks = make_tasks(CONVERSATIONS, seed=11, prompt_chars=(4_000, 6_000), arrivals_s=0.0)
        self.turns = TurnCollector()

    async def run(
        self,
        stack: LocalStack,
        *,
        on_turn: Callable[[TurnRecord], None] | None = None,
        goodbye: bool = True,
        streaming: bool = True,
    ) -> list[AgentRun]:
        """Run all agents. `goodbye`: report and release at the end, which takes a broker."""
        self._rounds += 1
        folder = self._folder / f"round-{self._rounds}"
        self.turns.clear()
        hooks = [self.turns] if on_turn is None else [self.turns, on_turn]
        async with ConServe(stack.broker_url, on_turn=hooks) as conserve:
            model = ConServeChat(model=stack.model, conserve=conserve, streaming=streaming)

            def agent_for(task: Task) -> Agent:
                tools = Toolbox(Workspace(folder / task.conversation_id, seed=task.seed)).tools()
                return build_agent(model.bind_tools(tools), tools)

            runs = await run_agents(self.tasks, agent_for=agent_for)
            if goodbye:
                assert conserve.flush(20)
                for task in self.tasks:
                    await conserve.arelease(task.conversation_id)
        return runs


@pytest.fixture
def crew(tmp_path: Path) -> Crew:
    return Crew(tmp_path)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[LocalStack]:
    journal = {"journal": {"path": str(tmp_path / "leases.sqlite")}}
    fleet = default_fleet(time_scale=0.0, tool_calls_min=2, tool_calls_max=4)
    with LocalStack(fleet=fleet, preset="paper", settings=journal) as stack:
        yield stack

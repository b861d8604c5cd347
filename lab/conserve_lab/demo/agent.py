"""The demo's agent: an ordinary LangGraph tool loop. Nothing in it knows of leases or engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from conserve_lab.demo.tasks import SYSTEM_PROMPT, Task

Agent = CompiledStateGraph[Any, Any, Any, Any]
AgentFactory = Callable[[Task], Agent]

_RECURSION_LIMIT = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRun:
    """How one conversation went.

    Attributes:
        turns: answers of the model.
        tool_calls, tool_errors: calls made, and those of them that a tool refused.
        messages: the whole history, the last answer included.
        error: empty, or what ended it early, in one line.
    """

    task: Task
    turns: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    messages: tuple[AnyMessage, ...] = ()
    error: str = ""


def build_agent(model: Runnable[Any, Any], tools: Sequence[BaseTool]) -> Agent:
    """Build the loop: the model decides, the tools run, until the model answers in words.

    Args:
        model: a node: reads the state's messages and answers `{"messages": [message]}`.
        tools: what it may call; a tool's error goes back to the model as the tool's answer.
    """
    builder = StateGraph(MessagesState)
    builder.add_node("agent", model)
    builder.add_node("tools", ToolNode(tools, handle_tool_errors=True))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", tools_condition)
    builder.add_edge("tools", "agent")
    return builder.compile()


async def run_agents(
    tasks: Sequence[Task],
    *,
    agent_for: AgentFactory,
    on_finish: Callable[[AgentRun], None] | None = None,
) -> list[AgentRun]:
    """Run all conversations concurrently, each from its arrival on; answers in the order of `tasks`.

    An agent that fails ends as a run with `error` set; the others go on.
    """
    agents = await asyncio.to_thread(lambda: [agent_for(task) for task in tasks])  # files and databases take a while
    start_s = asyncio.get_running_loop().time()

    async def one(task: Task, agent: Agent) -> AgentRun:
        await asyncio.sleep(max(0.0, start_s + task.arrival_s - asyncio.get_running_loop().time()))
        run = await _run(task, agent)
        if on_finish is not None:
            on_finish(run)
        return run

    return list(await asyncio.gather(*map(one, tasks, agents)))


async def _run(task: Task, agent: Agent) -> AgentRun:
    config: RunnableConfig = {"configurable": {"thread_id": task.conversation_id}, "recursion_limit": _RECURSION_LIMIT}
    question = [SystemMessage(SYSTEM_PROMPT), HumanMessage(task.prompt)]
    try:
        state = await agent.ainvoke({"messages": question}, config)
    except Exception as failure:  # noqa: BLE001 - one agent's failure is a figure of the report, not its end
        return AgentRun(task=task, error=f"{task.conversation_id}: {type(failure).__name__}: {failure}")
    messages = tuple(state["messages"])
    answers = [message for message in messages if isinstance(message, AIMessage)]
    results = [message for message in messages if isinstance(message, ToolMessage)]
    return AgentRun(
        task=task,
        turns=len(answers),
        tool_calls=sum(len(answer.tool_calls) for answer in answers),
        tool_errors=sum(1 for result in results if result.status == "error"),
        messages=messages,
    )

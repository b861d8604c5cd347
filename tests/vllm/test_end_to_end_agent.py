"""A LangGraph agent on real vLLM: its tool calls come from the server, its conversation moves once."""

import operator
from typing import Annotated, Literal

from langchain_core.messages import AIMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from pydantic import Field

from conserve_langgraph import ConServeChat

from .leased import Meter, within

TURNS = 5
BUDGET_S = 100.0


@tool
def calculate(
    left: Annotated[int, Field(ge=0, le=9)],
    operation: Literal["add", "mul", "sub"],
    right: Annotated[int, Field(ge=0, le=9)],
) -> str:
    """Calculate with two digits."""
    return str(getattr(operator, operation)(left, right))


def build(llm, *, eos_token_id):
    """The usual loop; since random weights decide nothing, the node says in which turn the answer is due."""
    push = {str(eos_token_id): 100}  # ends an answer as soon as the grammar allows
    calling = llm.bind_tools([calculate], tool_choice="required", strict=True, logit_bias=push, max_tokens=200)
    speaking = llm.bind_tools([calculate], tool_choice="none", strict=True, max_tokens=16)

    def agent(state, config):
        answered = sum(isinstance(message, AIMessage) for message in state["messages"])
        return (calling if answered < TURNS - 1 else speaking).invoke(state, config)

    builder = StateGraph(MessagesState)
    builder.add_node("agent", agent)
    builder.add_node("tools", ToolNode([calculate], handle_tool_errors=False))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", tools_condition)
    builder.add_edge("tools", "agent")
    return builder.compile()


def test_a_tool_loop_of_five_turns_moves_its_kv_once(stage, fleet):
    conserve = stage.sdk(stage.broker())
    llm = ConServeChat(model=fleet.model, conserve=conserve, temperature=0, max_retries=0)
    graph = build(llm, eos_token_id=fleet.eos_token_id)
    meter = Meter(fleet)
    question = {"messages": [SystemMessage("You calculate."), ("user", stage.raw.prose("agent", 200))]}

    with within(BUDGET_S):
        state = graph.invoke(question, {"configurable": {"thread_id": "agent-1"}, "recursion_limit": 30})

    counted = meter.settled(requests=TURNS, transfers=1)
    records = stage.turns.records
    results = [message for message in state["messages"] if isinstance(message, ToolMessage)]
    assert len(results) == TURNS - 1
    assert all(result.status == "success" and int(result.content) is not None for result in results)
    assert not state["messages"][-1].tool_calls
    assert (counted.decoders.transfers, counted.prefiller.requests, counted.decoders.requests) == (1, 1, TURNS)
    assert {record.conversation_id for record in records} == {"agent-1"}
    assert [record.migrated for record in records] == [True] + [False] * (TURNS - 1)
    assert all(record.cached_tokens > 0 for record in records[1:])
    assert not any(record.error or record.loss for record in records)
    assert [record.ttfet_ms is not None for record in records] == [False] * (TURNS - 1) + [True]

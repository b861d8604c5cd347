"""A LangGraph agent with a tool. `ConServeChat` is the node, the thread is the leased conversation.

conserve demo --serve &
CONSERVE_BROKER_URL=http://127.0.0.1:7070 python examples/langgraph_agent.py
"""

import os
from pathlib import Path

from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from conserve_langgraph import ConServeChat

MODEL = os.environ.get("CONSERVE_MODEL", "emulated")


@tool
def count_lines(limit: int) -> str:
    """Count the lines of this program's first `limit` lines that hold text."""
    lines = Path(__file__).read_text("utf-8").splitlines()[:limit]
    return f"{sum(bool(line.strip()) for line in lines)} of {len(lines)} lines hold text"


def main() -> None:
    llm = ConServeChat(model=MODEL)  # the broker's address comes from CONSERVE_BROKER_URL

    builder = StateGraph(MessagesState)
    builder.add_node("agent", llm.bind_tools([count_lines]))
    builder.add_node("tools", ToolNode([count_lines], handle_tool_errors=True))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", tools_condition)
    builder.add_edge("tools", "agent")
    graph = builder.compile()

    question = {"messages": [("user", "How much of this program is text?")]}
    state = graph.invoke(question, {"configurable": {"thread_id": "example-langgraph"}, "recursion_limit": 60})
    for message in state["messages"]:
        message.pretty_print()
    llm.conserve.release("example-langgraph")


if __name__ == "__main__":
    main()

"""A program of its own, run by `test_resume.py`: one run of a thread whose checkpoints are in a file.

python resumed_elsewhere.py BROKER_URL CHECKPOINTS THREAD ask|answer
"""

import json
import sys

from langchain_core.tools import tool
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, interrupt

from conserve_langgraph import ConServeChat
from conserve_sdk import ConServe
from conserve_sdk.telemetry import TurnCollector


@tool
def delete_file(path: str) -> str:
    """Delete a file, if a person agrees."""
    return f"{interrupt(f'Delete {path}?')}: {path}"


def main(broker_url: str, checkpoints: str, thread: str, step: str) -> None:
    turns = TurnCollector()
    with ConServe(broker_url, on_turn=turns) as conserve, SqliteSaver.from_conn_string(checkpoints) as saver:
        llm = ConServeChat(model="emulated", conserve=conserve)
        builder = StateGraph(MessagesState)
        builder.add_node("agent", llm.bind_tools([delete_file]))
        builder.add_node("tools", ToolNode([delete_file]))
        builder.add_edge(START, "agent")
        builder.add_conditional_edges("agent", tools_condition)
        builder.add_edge("tools", "agent")
        graph = builder.compile(checkpointer=saver)
        question = {"messages": [("user", "Delete the file `a.txt`. " + "It is old. " * 200)]}
        state = graph.invoke(
            question if step == "ask" else Command(resume="yes"), {"configurable": {"thread_id": thread}}
        )
    seen = [
        {
            "lease": record.lease_id,
            "decoder": record.decoder_id,
            "migrated": record.migrated,
            "cached": record.cached_tokens,
        }
        for record in turns.records
    ]
    print(json.dumps({"turns": seen, "messages": len(state["messages"]), "waits": "__interrupt__" in state}))


if __name__ == "__main__":
    main(*sys.argv[1:])

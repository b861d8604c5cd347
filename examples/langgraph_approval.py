"""A LangGraph agent that asks before it acts. While it waits for a person, no engine keeps its KV cache.

conserve demo --serve &
CONSERVE_BROKER_URL=http://127.0.0.1:7070 python examples/langgraph_approval.py
"""

import os
import tempfile
from pathlib import Path

from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from conserve_langgraph import ConServeChat

MODEL = os.environ.get("CONSERVE_MODEL", "emulated")
SCRATCH = Path(tempfile.gettempdir()) / "conserve-example"


@tool
def write_note(text: str) -> str:
    """Write a note into a file."""
    SCRATCH.mkdir(exist_ok=True)
    (SCRATCH / "note.txt").write_text(text, "utf-8")
    return f"wrote {len(text)} characters"


def main() -> None:
    agent = create_agent(
        ConServeChat(model=MODEL),  # the broker's address comes from CONSERVE_BROKER_URL
        [write_note],
        middleware=[HumanInTheLoopMiddleware(interrupt_on={"write_note": True})],
        checkpointer=InMemorySaver(),  # a database's saver lets another process go on with the thread
    )
    thread: RunnableConfig = {"configurable": {"thread_id": "example-approval"}}
    state = agent.invoke({"messages": [("user", "Write a note that says `hello`")]}, thread)
    while waiting := state.get("__interrupt__"):
        (request,) = waiting[0].value["action_requests"]
        print(f"approved: {request['name']}({request['args']})")
        state = agent.invoke(Command(resume={"decisions": [{"type": "approve"}]}), thread)
    print(state["messages"][-1].text)


if __name__ == "__main__":
    main()

"""Pydantic AI: two runs that share their history are turns of one leased conversation.

conserve demo --serve &
CONSERVE_BROKER_URL=http://127.0.0.1:7070 python examples/pydantic_ai_agent.py
"""

import os

from pydantic_ai import Agent

from conserve_pydantic_ai import ConServeModel

MODEL = os.environ.get("CONSERVE_MODEL", "emulated")


def main() -> None:
    model = ConServeModel(MODEL)  # the broker's address comes from CONSERVE_BROKER_URL
    agent = Agent(model, instructions="Use the tool, then answer in one sentence.")

    @agent.tool_plain
    def add(left: int, right: int) -> int:
        """Add two whole numbers."""
        return left + right

    first = agent.run_sync("What is 19 + 23?")
    print(f"What is 19 + 23? {first.output}")
    second = agent.run_sync("Is that more than 40?", message_history=first.all_messages())
    print(f"Is that more than 40? {second.output}")
    model.conserve.release(second.conversation_id)


if __name__ == "__main__":
    main()

"""Each example runs as a program of its own against a broker and emulated engines."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAYS = {
    "plain_openai.py": "turn 3 on d",
    "langgraph_agent.py": "Tool Message",
    "langgraph_approval.py": "approved: write_note(",
    "openai_agents_session.py": "Is that more than 40?",
    "openai_agents_approval.py": "approved: ",
    "pydantic_ai_agent.py": "Is that more than 40?",
}
ELSEWHERE = {"litellm_client.py", "llamaindex_llm.py"}
"""Need libraries that are not installed here: `tests/clients/test_third_party.py`."""


@pytest.fixture(scope="module")
def stack() -> Iterator[LocalStack]:
    with LocalStack(fleet=default_fleet(time_scale=0.0, tool_calls_min=1, tool_calls_max=2)) as stack:
        yield stack


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == SAYS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, stack: LocalStack) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        env={**os.environ, "CONSERVE_BROKER_URL": stack.broker_url},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
    assert done.stderr == ""

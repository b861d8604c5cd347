"""Libraries that take an openai client take ConServe's. They are heavy, so they need not be installed here.

`make test-third-party` makes an environment that has them; CONSERVE_THIRD_PARTY_PYTHON names its interpreter, and with
CONSERVE_REQUIRE_THIRD_PARTY set it is an error if they are missing there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conserve_lab.stack import LocalStack

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PYTHON = os.environ.get("CONSERVE_THIRD_PARTY_PYTHON", sys.executable)


@pytest.mark.parametrize(
    ("example", "module"), [("litellm_client.py", "litellm"), ("llamaindex_llm.py", "llama_index.llms.litellm")]
)
def test_example(stack: LocalStack, example: str, module: str) -> None:
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module.split('.')[0]!r}) is None)"
    if subprocess.run([PYTHON, "-c", find], timeout=60, check=False).returncode:
        missing = f"{module} is not installed in {PYTHON}: make test-third-party"
        pytest.fail(missing) if os.environ.get("CONSERVE_REQUIRE_THIRD_PARTY") else pytest.skip(missing)
    before = _turns(stack)
    done = subprocess.run(
        [PYTHON, EXAMPLES / example],
        env={**os.environ, "CONSERVE_BROKER_URL": stack.broker_url},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "And who renews it? " in done.stdout
    sessions = _turns(stack)[len(before) :]
    name = f"example-{example.partition('_')[0]}"
    assert len(sessions) >= 2
    assert all(session.startswith(f"{name}/") for session in sessions)


def _turns(stack: LocalStack) -> list[str]:
    """The session of every request that a decoder has answered."""
    return [request.session_id or "" for engine in stack.fleet.decoders for request in engine.requests]

"""One broker in front of an emulated fleet for all tests here; each test brings its own conversations."""

import time
from collections.abc import Callable, Iterator

import httpx2
import pytest

from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack
from conserve_langgraph import ConServeChat
from conserve_sdk import ConServe
from conserve_sdk.protocol import LeaseExplanation
from tests.support.agents import conserve, turns

__all__ = ["conserve", "turns"]


@pytest.fixture(scope="module")
def stack() -> Iterator[LocalStack]:
    fleet = default_fleet(time_scale=0.0, tool_calls_min=2, tool_calls_max=4)
    with LocalStack(fleet=fleet, preset="paper") as stack:
        yield stack


@pytest.fixture
def llm(stack: LocalStack, conserve: ConServe) -> ConServeChat:
    return ConServeChat(model=stack.model, conserve=conserve)


@pytest.fixture
def lease_now(stack: LocalStack) -> Callable[[str], LeaseExplanation | None]:
    """What the broker knows of a lease; None once it is gone."""

    def ask(lease_id: str) -> LeaseExplanation | None:
        answer = httpx2.get(f"{stack.broker_url}/v1/leases/{lease_id}/explain", timeout=30)
        return None if answer.status_code == 404 else LeaseExplanation.model_validate_json(answer.content)

    return ask


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Wait for a condition, generously."""

    def wait(holds: Callable[[], bool]) -> None:
        give_up_at_s = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < give_up_at_s, "the condition did not come to hold"
            time.sleep(0.02)

    return wait

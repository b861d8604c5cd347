"""What the tests of agent adapters share: one broker in front of an emulated fleet, and a look into both."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack
from conserve_sdk import ConServe
from conserve_sdk._broker_client import AsyncBrokerClient
from conserve_sdk.protocol import LeaseGrant, LeaseRequest
from conserve_sdk.telemetry import TurnCollector

__all__ = ["Activity", "activity", "asked", "conserve", "stack", "turns"]

Activity = Callable[[str | None], str]


@pytest.fixture(scope="module")
def stack() -> Iterator[LocalStack]:
    fleet = default_fleet(time_scale=0.0, tool_calls_min=2, tool_calls_max=3)
    # Lives that outlast any delay of a busy machine: what tests look at is what the broker was told.
    lives = {"lease": {"ttl_ms": 3_600_000, "park_ttl_ms": 1_800_000}}
    with LocalStack(fleet=fleet, preset="paper", settings=lives) as stack:
        yield stack


@pytest.fixture
def turns() -> TurnCollector:
    return TurnCollector()


@pytest.fixture
def conserve(stack: LocalStack, turns: TurnCollector) -> Iterator[ConServe]:
    """Async tests enter it once more (`async with conserve`), so that no connection outlives their event loop."""
    with ConServe(stack.broker_url, on_turn=turns) as conserve:
        yield conserve


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[LeaseRequest]:
    """What async code asks the broker for from now on."""
    requests: list[LeaseRequest] = []
    acquire = AsyncBrokerClient.acquire

    async def noted(self: AsyncBrokerClient, request: LeaseRequest, **how: Any) -> LeaseGrant:
        requests.append(request)
        return await acquire(self, request, **how)

    monkeypatch.setattr(AsyncBrokerClient, "acquire", noted)
    return requests


@pytest.fixture
def activity(stack: LocalStack) -> Activity:
    """What the broker says of a lease: `busy`, `idle`, `parked`, or `gone`."""

    def ask(lease_id: str | None) -> str:
        answer = httpx2.get(f"{stack.broker_url}/v1/leases/{lease_id}/explain")
        return "gone" if answer.status_code == 404 else str(answer.json()["activity"])

    return ask

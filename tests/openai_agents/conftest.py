"""One broker in front of an emulated fleet for all tests here."""

from collections.abc import Iterator

import pytest

from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack
from conserve_openai_agents import ConServeModelProvider
from conserve_sdk import ConServe
from conserve_sdk.telemetry import TurnCollector


@pytest.fixture(scope="module")
def stack() -> Iterator[LocalStack]:
    fleet = default_fleet(time_scale=0.0, tool_calls_min=2, tool_calls_max=3)
    with LocalStack(fleet=fleet, preset="paper") as stack:
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
def provider(stack: LocalStack, conserve: ConServe) -> ConServeModelProvider:
    return ConServeModelProvider(conserve=conserve, default_model=stack.model)

"""The Agents SDK's model provider before an emulated fleet."""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from uuid import uuid4

import pytest
from agents import RunConfig, SQLiteSession

from conserve_lab.stack import LocalStack
from conserve_openai_agents import ConServeModelProvider, _runs
from conserve_sdk import ConServe
from tests.support.agents import Activity, activity, asked, conserve, stack, turns

__all__ = ["Activity", "Config", "activity", "asked", "conserve", "stack", "turns"]

Config = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runs, "GOODBYE_S", 60.0)


@pytest.fixture
def provider(stack: LocalStack, conserve: ConServe) -> ConServeModelProvider:
    return ConServeModelProvider(conserve=conserve, default_model=stack.model)


@pytest.fixture
def config(provider: ConServeModelProvider) -> Config:
    return partial(RunConfig, model_provider=provider, tracing_disabled=True)


@pytest.fixture
def session() -> Iterator[SQLiteSession]:
    with closing(SQLiteSession(uuid4().hex)) as opened:  # Python 3.13 warns of databases that nobody closed
        yield opened

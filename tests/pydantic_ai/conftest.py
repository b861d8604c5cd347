"""Pydantic AI's models before an emulated fleet."""

import pytest

from conserve_lab.stack import LocalStack
from conserve_pydantic_ai import ConServeModel, _runs
from conserve_sdk import ConServe
from tests.support.agents import Activity, activity, asked, conserve, stack, turns

__all__ = ["Activity", "activity", "asked", "conserve", "stack", "turns"]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runs, "GOODBYE_S", 60.0)


@pytest.fixture
def model(stack: LocalStack, conserve: ConServe) -> ConServeModel:
    return ConServeModel(stack.model, conserve=conserve)

"""The private hooks of openai-agents that the adapter rests on. A release that drops one fails here, with a remedy."""

import importlib
import inspect
import sys

import pytest
from agents import Agent, Runner
from agents.models.interface import Model
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from agents.models.openai_responses import OpenAIResponsesModel

from conserve_openai_agents import ConServeModelProvider, _hooks
from conserve_openai_agents._runs import book_of

from .conftest import Config


def test_the_runner_asks_a_model_whether_it_wants_a_key() -> None:
    for base in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        assert callable(getattr(base, "_supports_default_prompt_cache_key", None)), (
            "openai-agents no longer asks models whether they want a key per session: find where the runner now passes "
            "session or group to a model and read it in `_identity.name_turn`; until then conversations are found by "
            "content, and only `with conserve_sdk.conversation(...)` names them"
        )


def test_the_runner_tells_a_model_that_the_run_is_over() -> None:
    hook = getattr(Model, "_cleanup_on_run_end", None)
    assert inspect.iscoroutinefunction(hook), (
        "openai-agents no longer tells models that a run is over: move `RunBook.end` to what replaces "
        "`Model._cleanup_on_run_end` (or to `RunHooks.on_agent_end`, which users must then pass); until then leases of "
        "finished runs end by their time instead of being released"
    )
    assert list(inspect.signature(hook).parameters) == ["self", "owner"]


def test_a_model_call_knows_its_run() -> None:
    assert _hooks.READS_OWNER, (
        "openai-agents no longer has models._run_context.get_model_run_owner: find another object that a model call "
        "and `_cleanup_on_run_end` share and return it from `_hooks.current_run_owner`"
    )


async def test_the_run_of_a_call_is_the_one_that_ends(
    provider: ConServeModelProvider, config: Config, monkeypatch
) -> None:
    ended = []
    book = book_of(provider.conserve)
    whole = book.end

    async def end(owner, *, conserve):
        ended.append(book._runs.get(owner) is not None)
        await whole(owner, conserve=conserve)

    monkeypatch.setattr(book, "end", end)
    async with provider.conserve:
        await Runner.run(Agent(name="a", instructions="Be brief."), "Hello.", run_config=config())
    assert ended == [True], (
        "the object given to `_cleanup_on_run_end` is no longer the one that model calls see: see `_hooks`"
    )
    assert not book._runs


def test_a_release_without_the_run_of_a_call_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "agents.models._run_context", None)
    try:
        without = importlib.reload(_hooks)
        assert not without.READS_OWNER
        assert without.current_run_owner() is None
    finally:
        monkeypatch.undo()
        importlib.reload(_hooks)


async def test_without_the_run_of_a_call_turns_go_on_and_leases_end_by_their_time(
    provider: ConServeModelProvider, config: Config, monkeypatch
) -> None:
    monkeypatch.setattr(_hooks, "_read", None)
    async with provider.conserve:
        result = await Runner.run(Agent(name="a", instructions="Be brief."), "Hello.", run_config=config())
    assert result.final_output
    assert not book_of(provider.conserve)._runs

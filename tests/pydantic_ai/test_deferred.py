"""Runs that end in calls for somebody else: an approval, or work done elsewhere."""

import asyncio
from types import SimpleNamespace

import pytest
from pydantic_ai import Agent, ApprovalRequired, DeferredToolRequests, DeferredToolResults, RunContext
from pydantic_ai.models import Model

from conserve_pydantic_ai import ConServeModel, _runs
from conserve_pydantic_ai._runs import Run, run_scope
from conserve_sdk import conversation
from conserve_sdk.telemetry import TurnCollector

from .conftest import Activity

LONG = "You keep the files of an office in order. " * 100


def _careful(model: ConServeModel) -> Agent[None, str | DeferredToolRequests]:
    agent = Agent(model, instructions=LONG, output_type=[str, DeferredToolRequests])

    @agent.tool_plain(requires_approval=True)
    def delete_file(name: str) -> str:
        """Delete a file."""
        return f"deleted {name}"

    @agent.tool
    def rename_folder(context: RunContext[None], name: str) -> str:
        """Rename a folder."""
        if not context.tool_call_approved:
            raise ApprovalRequired
        return f"renamed {name}"

    return agent


@pytest.mark.parametrize("task", ["Delete file a.", "Rename folder a."], ids=["by declaration", "by decision"])
async def test_an_approval_parks_and_its_resumption_goes_on(
    model: ConServeModel, turns: TurnCollector, activity: Activity, task: str
) -> None:
    async with model.conserve:
        agent = _careful(model)
        result = await agent.run(task)
        lease_id = turns.records[0].lease_id
        while isinstance(result.output, DeferredToolRequests):
            assert activity(lease_id) == "parked"
            answers = DeferredToolResults(approvals={call.tool_call_id: True for call in result.output.approvals})
            result = await agent.run(message_history=result.all_messages(), deferred_tool_results=answers)
        assert {record.lease_id for record in turns.records} == {lease_id}
        assert [record.migrated for record in turns.records] == [True] + [False] * (len(turns.records) - 1)
        assert model.conserve.flush(60)
        assert activity(lease_id) == "idle"


async def test_a_streamed_run_parks_too(model: ConServeModel, turns: TurnCollector, activity: Activity) -> None:
    async with model.conserve:
        async with _careful(model).run_stream("Delete file a.") as stream:
            assert isinstance(await stream.get_output(), DeferredToolRequests)
        assert activity(turns.records[0].lease_id) == "parked"


async def test_a_run_inside_another_of_the_same_conversation_parks_nothing(
    model: ConServeModel, turns: TurnCollector, activity: Activity
) -> None:
    states = []
    async with model.conserve:
        boss: Agent[None, str] = Agent(model, instructions="You delegate. " + LONG)

        @boss.tool_plain
        async def delegate(name: str) -> str:
            """Have a file deleted."""
            result = await _careful(model).run(f"Delete file {name}.")
            states.extend(activity(record.lease_id) for record in turns.records)
            return "deferred" if isinstance(result.output, DeferredToolRequests) else "done"

        with conversation(f"shared-{id(turns)}"):
            await boss.run("Delegate a.")
        assert states
        assert "parked" not in states


async def test_a_broker_that_does_not_answer_holds_no_run_up(
    model: ConServeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def silence(_conversation: str) -> int:
        await asyncio.sleep(3_600)
        return 0

    async with model.conserve:
        monkeypatch.setattr(model.conserve, "apark", silence)
        monkeypatch.setattr(_runs, "GOODBYE_S", 0.05)
        with caplog.at_level("INFO", logger="conserve_pydantic_ai"):
            result = await _careful(model).run("Delete file a.")
    assert isinstance(result.output, DeferredToolRequests)
    assert "pause_untold" in caplog.text


async def test_a_closed_conserve_is_not_asked() -> None:
    conserve = SimpleNamespace(closed=True, idle=lambda _name: 0)  # no `apark`: calling it would fail
    async with run_scope(conserve):  # type: ignore[arg-type]
        run = _runs.current_run()
        assert isinstance(run, Run)
        run.asks("c")
        run.defers = True


def test_an_agent_run_still_surrounds_its_model() -> None:
    assert callable(getattr(Model, "_run_scope", None)), (
        "Pydantic AI no longer has models hold a context around a run: offer `run_scope` as a capability (`wrap_run`, "
        "public, but users must pass it) or hook it into what replaces `Model._run_scope`; until then leases of "
        "finished runs end by their time, and deferred tools no longer park"
    )

"""Real Pydantic AI agents over a broker and emulated engines."""

import asyncio
from uuid import uuid4

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, ModelSettings, NativeOutput, RunContext, UsageLimitExceeded, UsageLimits
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.openai import OpenAIResponsesModel

from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack
from conserve_pydantic_ai import ConServeModel, ConServeProvider
from conserve_sdk import ConServe, conversation
from conserve_sdk.protocol import LeaseRequest
from conserve_sdk.telemetry import TurnCollector, TurnRecord
from tests.support.loops import loop_for_blocking_runs

from .conftest import Activity

LONG = "You keep the files of an office in order. " * 100


class Verdict(BaseModel):
    """How a file was found."""

    tidy: bool
    pages: int


def _clerk(model: ConServeModel, **options: object) -> Agent[None, str]:
    agent = Agent(model, instructions=LONG, **options)  # type: ignore[call-overload]

    @agent.tool_plain
    def look_up(name: str) -> str:
        """Look up a file."""
        return f"{name}: 3 pages"

    return agent  # type: ignore[no-any-return]


def _one_lease(records: list[TurnRecord]) -> None:
    assert len({(record.conversation_id, record.lease_id, record.decoder_id) for record in records}) == 1
    assert [record.migrated for record in records] == [True] + [False] * (len(records) - 1)


def _renewed(conserve: ConServe) -> bool:
    kit = conserve._runtime.kit
    return kit.registry.next_renewal_ms(now_ms=kit.now_ms()) is not None


async def test_runs_that_share_their_history_are_turns_of_one_lease(
    model: ConServeModel, turns: TurnCollector, activity: Activity
) -> None:
    async with model.conserve:
        agent = _clerk(model)
        first = await agent.run("Look up a.")
        second = await agent.run("Look up b.", message_history=first.all_messages())
        async with agent.run_stream("Look up c.", message_history=second.all_messages()) as stream:
            assert await stream.get_output()
        assert len(turns.records) >= 9
        _one_lease(turns.records)
        assert turns.records[0].conversation_id == first.conversation_id
        assert model.conserve.flush(60)
        assert activity(turns.records[0].lease_id) == "idle"


async def test_the_application_may_name_the_conversation(model: ConServeModel, turns: TurnCollector) -> None:
    async with model.conserve:
        name, block = f"ticket-{uuid4().hex}", f"block-{uuid4().hex}"
        await _clerk(model).run("Look up a.", conversation_id=name)
        with conversation(block):
            await _clerk(model).run("Look up a.", conversation_id="another")
        headers = ModelSettings(extra_headers={"X-ConServe-Conversation": f"h-{name}"})
        await _clerk(model).run("Look up a.", conversation_id="another", model_settings=headers)
        assert list(dict.fromkeys(record.conversation_id for record in turns.records)) == [name, block, f"h-{name}"]


async def test_separate_runs_are_separate_conversations(model: ConServeModel, turns: TurnCollector) -> None:
    async with model.conserve:
        await asyncio.gather(*(_clerk(model).run(f"Look up {name}.") for name in "abc"))
        assert len({record.conversation_id for record in turns.records}) == 3


async def test_a_delegate_has_a_conversation_of_its_own_whose_lease_names_its_parent(
    model: ConServeModel, turns: TurnCollector, activity: Activity, asked: list[LeaseRequest]
) -> None:
    async with model.conserve:
        boss: Agent[None, str] = Agent(model, instructions="You delegate. " + LONG)
        worker = _clerk(model)

        @boss.tool
        async def delegate(context: RunContext[None], name: str) -> str:
            """Have a file looked up."""
            return (await worker.run(f"Look up {name}.", usage=context.usage)).output

        result = await boss.run("Delegate a.")
        by_conversation: dict[str, list[TurnRecord]] = {}
        for record in turns.records:
            by_conversation.setdefault(record.conversation_id, []).append(record)
        assert len(by_conversation) >= 3, "the boss, and each of its delegations"
        _one_lease(by_conversation[result.conversation_id])
        boss_lease = by_conversation[result.conversation_id][0].lease_id
        parents = {request.conversation_id: request.parent_lease_id for request in asked}
        assert parents.pop(result.conversation_id) is None
        assert set(parents.values()) == {boss_lease}
        assert set(parents) == set(by_conversation) - {result.conversation_id}
        assert model.conserve.flush(60)
        assert {activity(record.lease_id) for record in turns.records} == {"idle"}


async def test_a_structured_result_is_the_end_of_its_run(
    model: ConServeModel, turns: TurnCollector, activity: Activity
) -> None:
    """By default the result is a tool call: nobody answers it, so its lease must not be renewed."""
    async with model.conserve:
        agent = Agent(model, instructions=LONG, output_type=Verdict)
        assert isinstance((await agent.run("Is it tidy?")).output, Verdict)
        assert turns.records[-1].finish_reason == "tool_calls"
        assert not _renewed(model.conserve)
        assert model.conserve.flush(60)
        assert activity(turns.records[-1].lease_id) == "idle", "a result waits for nobody"


async def test_a_native_structured_result(model: ConServeModel) -> None:
    async with model.conserve:
        agent = Agent(model, instructions=LONG, output_type=NativeOutput(Verdict))
        assert isinstance((await agent.run("Is it tidy?")).output, Verdict)


async def test_a_run_that_raises_is_over(model: ConServeModel, turns: TurnCollector, activity: Activity) -> None:
    async with model.conserve:
        with pytest.raises(UsageLimitExceeded):
            await _clerk(model).run("Look up a.", usage_limits=UsageLimits(request_limit=1))
        assert model.conserve.flush(60)
        assert not _renewed(model.conserve)
        assert activity(turns.records[-1].lease_id) == "idle"


def test_blocking_runs_in_several_event_loops(model: ConServeModel, turns: TurnCollector) -> None:
    agent = _clerk(model)
    history: list[ModelMessage] = []
    for name in "abc":
        with loop_for_blocking_runs():
            history = agent.run_sync(f"Look up {name}.", message_history=history).all_messages()
    asyncio.run(agent.run("And now?", message_history=history))
    _one_lease(turns.records)


async def test_a_stream_that_is_left_ends_at_the_engine() -> None:
    """A token every 0.1 s or more: 2,000 of them take minutes, so an end in time is an abort."""
    fleet = default_fleet(time_scale=5.0, tool_calls_min=0, tool_calls_max=0)
    with LocalStack(fleet=fleet) as slow:
        async with ConServe(slow.broker_url) as conserve:
            agent = Agent(ConServeModel(slow.model, conserve=conserve), instructions="Talk.")
            settings = ModelSettings(max_tokens=2_000, extra_body={"ignore_eos": True})
            async with agent.run_stream("Go on.", model_settings=settings) as stream:
                async for _ in stream.stream_text(debounce_by=None):
                    break
            async with asyncio.timeout(120):
                # The engines live in another thread's loop.
                while not any(record.status == 499 for engine in slow.fleet.decoders for record in engine.requests):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize("made_by", ["api", "provider"])
async def test_the_responses_api(stack: LocalStack, conserve: ConServe, turns: TurnCollector, made_by: str) -> None:
    async with conserve:
        model = (
            ConServeModel(stack.model, conserve=conserve, api="responses")
            if made_by == "api"
            else OpenAIResponsesModel(stack.model, provider=ConServeProvider(conserve=conserve))
        )
        agent = _clerk(model)  # type: ignore[arg-type]
        first = await agent.run(f"Look up {made_by}.")
        async with agent.run_stream("Look up b.", message_history=first.all_messages()) as stream:
            assert await stream.get_output()
        assert {record.path for record in turns.records} == {"/v1/responses"}
        _one_lease(turns.records)


def test_models_of_one_broker_share_one_connection_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSERVE_BROKER_URL", "http://127.0.0.1:9")
    one, other = ConServeModel("a"), ConServeModel("b", broker_url="http://127.0.0.1:9")
    assert one.conserve is other.conserve
    assert (one.model_name, one.system) == ("a", "vllm")
    one.conserve.close()

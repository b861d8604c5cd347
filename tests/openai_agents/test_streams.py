"""Streams that are left, on an engine that takes its time."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
from agents import Agent, ModelSettings, ModelTracing, RunConfig, Runner

from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack
from conserve_openai_agents import ConServeModel, ConServeModelProvider
from conserve_sdk import ConServe

CLIENT_WENT_AWAY = 499
LONG_ANSWER = ModelSettings(max_tokens=2_000, extra_body={"ignore_eos": True})


@pytest.fixture(scope="module")
def slow() -> Iterator[LocalStack]:
    """A token every 0.1 s or more: 2,000 of them take minutes, so an end in time is an abort."""
    with LocalStack(fleet=default_fleet(time_scale=5.0, tool_calls_min=0, tool_calls_max=0)) as stack:
        for engine in stack.fleet.engines:
            engine.clear_requests()
        yield stack


async def _until(seen: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not seen():  # noqa: ASYNC110 -- the engines live in another thread's loop
            await asyncio.sleep(0.05)


async def _until_aborted(stack: LocalStack) -> None:
    decoders = stack.fleet.decoders
    await _until(lambda: any(record.status == CLIENT_WENT_AWAY for engine in decoders for record in engine.requests))
    for engine in stack.fleet.engines:
        engine.clear_requests()


async def test_a_cancelled_run_ends_its_request_at_the_engine(slow: LocalStack) -> None:
    async with ConServe(slow.broker_url) as conserve:
        provider = ConServeModelProvider(conserve=conserve, default_model=slow.model)
        agent = Agent(name="a", instructions="Talk.", model_settings=LONG_ANSWER)
        result = Runner.run_streamed(
            agent, "Go on.", run_config=RunConfig(model_provider=provider, tracing_disabled=True)
        )
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                result.cancel()
        await _until_aborted(slow)


async def test_closing_the_models_stream_ends_its_request_at_the_engine(slow: LocalStack) -> None:
    async with ConServe(slow.broker_url) as conserve:
        model = ConServeModel(slow.model, conserve=conserve)
        stream = model.stream_response(
            "Talk.",
            "Go on.",
            LONG_ANSWER,
            tools=[],
            output_schema=None,
            handoffs=[],
            tracing=ModelTracing.DISABLED,
            previous_response_id=None,
            conversation_id=None,
            prompt=None,
        )
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.aclose()
        await _until_aborted(slow)


async def test_a_cancelled_task_ends_its_request_at_the_engine(slow: LocalStack) -> None:
    async with ConServe(slow.broker_url) as conserve:
        provider = ConServeModelProvider(conserve=conserve, default_model=slow.model)
        agent = Agent(name="a", instructions="Talk.", model_settings=LONG_ANSWER)
        run = asyncio.create_task(
            Runner.run(agent, "Go on.", run_config=RunConfig(model_provider=provider, tracing_disabled=True))
        )
        await _until(lambda: any(engine.kv_used_blocks for engine in slow.fleet.decoders))
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        await _until_aborted(slow)

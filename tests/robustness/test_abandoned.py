"""Whoever leaves an answer ends it at the engine, wherever the turn was, and leaks neither lease nor connection."""

from __future__ import annotations

import asyncio
import gc

import openai
import pytest

from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack
from conserve_sdk import ConServe, conversation
from tests.support.loopback import MODEL, aeventually, eventually

MESSAGES = [{"role": "user", "content": "hello " * 400}]


def goes_on(conserve, *servers, at_rest) -> None:
    """The conversation is as usable as before, with the lease it had, and that is given back but once."""
    at_rest(conserve)
    for server in servers:
        server.then = "answer"
    with conversation("c1"):
        assert conserve.openai_client(max_retries=0).chat.completions.create(model=MODEL, messages=MESSAGES)
    at_rest(conserve)
    assert conserve.broker.core.lease_count() == 1
    assert conserve.release("c1") == 1
    assert conserve.broker.core.lease_count() == 0


def scene(engine, front, where: str, **options):
    """A fleet that holds the turn still at one place; returns `ConServe`, the holding engine, all engines."""
    prefiller = engine(then="hold" if where == "prefill" else "answer")
    decoder = engine(then={"first_byte": "hold", "mid_stream": "hold_stream"}.get(where, "answer"))
    conserve = front(options, p0=prefiller, d0=decoder)
    return conserve, prefiller if where == "prefill" else decoder, (prefiller, decoder)


async def read(conserve, started: asyncio.Event | None = None) -> None:
    with conversation("c1"):
        stream = await conserve.async_openai_client(max_retries=0).chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True
        )
        async for _ in stream:
            if started is not None:
                started.set()


@pytest.mark.parametrize("where", ["prefill", "first_byte", "mid_stream"])
def test_a_cancelled_task(engine, front, at_rest, where) -> None:
    conserve, holding, servers = scene(engine, front, where)

    async def go() -> None:
        started = asyncio.Event()
        task = asyncio.ensure_future(read(conserve, started))
        await aeventually(lambda: holding.waiting == 1)
        if where == "mid_stream":
            await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await aeventually(lambda: holding.aborted == 1, "the engine sees the abort")
        await conserve._runtime.async_engines.aclose()

    asyncio.run(go())
    assert [record.error for record in conserve.turns.records] == ["client_cancelled"]
    goes_on(conserve, *servers, at_rest=at_rest)


@pytest.mark.parametrize("where", ["prefill", "first_byte", "mid_stream"])
def test_an_async_timeout_around_the_call(engine, front, at_rest, where) -> None:
    conserve, holding, servers = scene(engine, front, where)

    async def read_with_a_limit() -> None:
        async with asyncio.timeout(None) as limit:
            held = asyncio.ensure_future(aeventually(lambda: holding.waiting == 1))
            held.add_done_callback(lambda _: limit.reschedule(0))
            await read(conserve)

    async def go() -> None:
        with pytest.raises(TimeoutError):
            await read_with_a_limit()
        await aeventually(lambda: holding.aborted == 1, "the engine sees the abort")

    asyncio.run(go())
    goes_on(conserve, *servers, at_rest=at_rest)


@pytest.mark.parametrize("where", ["first_byte", "mid_stream"])
@pytest.mark.parametrize("colour", ["sync", "async"])
def test_the_clients_own_timeout(engine, front, at_rest, where, colour) -> None:
    conserve, holding, servers = scene(engine, front, where)

    def blocking() -> None:
        with conversation("c1"):
            stream = conserve.openai_client(max_retries=0, timeout=1.0).chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True
            )
            list(stream)

    async def looped() -> None:
        with conversation("c1"):
            client = conserve.async_openai_client(max_retries=0, timeout=1.0)
            stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            async for _ in stream:
                pass

    with pytest.raises(openai.APITimeoutError if where == "first_byte" else openai.APIConnectionError):
        blocking() if colour == "sync" else asyncio.run(looped())
    eventually(lambda: holding.aborted == 1, "the engine sees the abort")
    assert [record.error for record in conserve.turns.records] == ["timeout"]
    goes_on(conserve, *servers, at_rest=at_rest)


@pytest.mark.parametrize("how", ["close", "leave_block", "drop"])
def test_a_blocking_stream_that_is_left(engine, front, at_rest, how) -> None:
    conserve, holding, servers = scene(engine, front, "mid_stream")
    with conversation("c1"):
        stream = conserve.openai_client(max_retries=0).chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True
        )
    next(iter(stream))
    assert holding.aborted == 0
    if how == "close":
        stream.close()
    elif how == "leave_block":
        with stream:
            pass
    del stream
    gc.collect()  # openai's streams are cycles
    eventually(lambda: holding.aborted == 1, "the engine sees the abort")
    goes_on(conserve, *servers, at_rest=at_rest)


@pytest.mark.parametrize("how", ["close", "leave_block", "drop"])
def test_an_async_stream_that_is_left(engine, front, at_rest, how) -> None:
    conserve, holding, servers = scene(engine, front, "mid_stream")

    async def go() -> None:
        with conversation("c1"):
            stream = await conserve.async_openai_client(max_retries=0).chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True
            )
        await anext(aiter(stream))
        if how == "close":
            await stream.close()
        elif how == "leave_block":
            async with stream:
                pass
        del stream
        await aeventually(lambda: gc.collect() >= 0 and holding.aborted == 1, "the engine sees the abort")

    asyncio.run(go())
    goes_on(conserve, *servers, at_rest=at_rest)


def test_an_emulated_engine_stops_computing_for_a_client_that_left() -> None:
    """Counted where it costs: a long answer that nobody reads is not computed to its end, and its blocks come back."""
    fleet = default_fleet(prefillers=1, decoders=1, kv_lease_ms=500, tool_calls_min=0, tool_calls_max=0)
    with LocalStack(fleet=fleet, preset="paper") as stack, ConServe(stack.broker_url) as conserve:
        decoder = stack.fleet.engine("d0")
        with (
            conversation("long"),
            conserve.openai_client(max_retries=0).chat.completions.create(
                model=stack.model,
                messages=MESSAGES,
                stream=True,
                max_tokens=4_000,
                extra_body={"min_tokens": 4_000, "ignore_eos": True},
            ) as stream,
        ):
            next(iter(stream))
        eventually(lambda: decoder.requests, "the engine notes the end of the request")
        (request,) = decoder.requests
        assert request.status == 499
        assert request.completion_tokens < 4_000
        eventually(lambda: decoder.kv_used_blocks == 0, "its blocks are free again")

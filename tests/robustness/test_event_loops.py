"""One async client in several event loops and threads: no loop touches what another one left."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from conserve_sdk import ConServe, TurnCollector, conversation
from conserve_sdk._loops import PerLoop
from tests.support.loopback import MODEL, eventually

THREADS, LOOPS = 8, 3


def prompt(name: str) -> list[dict]:
    return [{"role": "user", "content": f"{name} " * 300}]


@pytest.mark.parametrize("stream", [False, True])
def test_one_client_in_three_loops_one_after_another(stack, stream) -> None:
    with ConServe(stack.broker_url) as conserve:
        client = conserve.async_openai_client(max_retries=0)

        async def once() -> int:
            with conversation(f"loops-{stream}"):
                answer = await client.chat.completions.create(
                    model=stack.model, messages=prompt("loops"), max_tokens=4, stream=stream
                )
            return len([chunk async for chunk in answer]) if stream else len(answer.choices)

        assert all(asyncio.run(once()) > 0 for _ in range(3))


def test_loops_that_are_closed_without_a_farewell_do_not_pile_up() -> None:
    closed: list[object] = []

    async def close(thing: object) -> None:
        closed.append(thing)

    kept = PerLoop(object, close=close)
    for _ in range(5):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(kept.get())
        loop.close()
    assert len(kept) == 1
    assert closed == []


def test_eight_threads_with_three_loops_each(stack) -> None:
    turns = TurnCollector()
    with ConServe(stack.broker_url, on_turn=turns) as conserve:
        client = conserve.async_openai_client(max_retries=0)

        async def talk(name: str, asked: int) -> None:
            messages = prompt(name)
            for _ in range(asked):
                with conversation(name):
                    answer = await client.chat.completions.create(model=stack.model, messages=messages, max_tokens=4)
                messages += [
                    {"role": "assistant", "content": answer.choices[0].message.content},
                    {"role": "user", "content": "more"},
                ]

        def thread(number: int) -> None:
            for loop in range(LOOPS):
                asyncio.run(talk(f"thread-{number}-{loop}", asked=2))

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(thread, range(THREADS)))
        assert len(conserve._runtime.async_engines._loops) == len(conserve._runtime.async_broker._loops) == 0
    records = turns.records
    assert len(records) == THREADS * LOOPS * 2
    assert {record.error for record in records} | {record.loss for record in records} == {""}
    assert sum(record.migrated for record in records) == THREADS * LOOPS


def test_each_loop_takes_its_connections_along(engine, front) -> None:
    server = engine()
    client = front(d0=server).async_openai_client(max_retries=0)

    async def twice() -> None:
        for _ in range(2):
            with conversation("c"):
                await client.chat.completions.create(model=MODEL, messages=prompt("c"))

    def thread(_: int) -> None:
        for _ in range(LOOPS):
            asyncio.run(twice())

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(thread, range(THREADS)))
    assert len(server.requests) == THREADS * LOOPS * 2
    assert len(server.ports) == THREADS * LOOPS
    eventually(lambda: not server.open, "connections of loops that are over")

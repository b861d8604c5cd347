"""A hundred conversations over threads, tasks and generators: none takes another's name, each is prefilled once."""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from conserve_sdk import conversation
from tests.support.loopback import MODEL

EACH = 25
TURNS = 3


def opening(name: str) -> list[dict]:
    return [{"role": "user", "content": f"{name} " * 300}]


def more(messages: list[dict], answer: str) -> list[dict]:
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "more"}]


def test_names_and_leases_do_not_mix(engine, front, at_rest) -> None:  # noqa: C901 -- one small function per way
    """Every request says in its first word whose it is; the engine compares that with the name it travels under."""
    prefiller, one, two = engine(), engine(), engine()
    conserve = front(p0=prefiller, d0=one, d1=two)
    client, aclient = conserve.openai_client(max_retries=0), conserve.async_openai_client(max_retries=0)

    def say(messages: list[dict]) -> str:
        answer = client.chat.completions.create(model=MODEL, messages=messages)
        return answer.choices[0].message.content or ""

    async def asay(messages: list[dict]) -> str:
        answer = await aclient.chat.completions.create(model=MODEL, messages=messages)
        return answer.choices[0].message.content or ""

    def thread(name: str) -> None:
        messages = opening(name)
        with conversation(name):
            for _ in range(TURNS):
                messages = more(messages, said := say(messages))
                assert said == name

    async def task(name: str) -> None:
        messages = opening(name)
        async with conversation(name):
            for _ in range(TURNS):
                messages = more(messages, said := await asay(messages))
                assert said == name

    def generator(name: str):
        """Holds its conversation open from one turn to the next, while others of its thread go on with theirs."""
        messages = opening(name)
        inside = contextvars.copy_context()
        inside.run(conversation(name).__enter__)
        for _ in range(TURNS):
            messages = more(messages, said := inside.run(say, messages))
            assert said == name
            yield

    async def agenerator(name: str):
        messages = opening(name)
        for _ in range(TURNS):
            with conversation(name):
                said = await asay(messages)
            messages = more(messages, said)
            assert said == name
            yield

    async def in_a_loop() -> None:
        generators = [agenerator(f"agenerator-{number}") for number in range(EACH)]
        async with asyncio.TaskGroup() as group:
            for number in range(EACH):
                group.create_task(task(f"task-{number}"))
            for _ in range(TURNS):  # all of them in turn, from one task
                for each in generators:
                    await anext(each)
        for each in generators:
            await each.aclose()
        # A thread of the loop's executor sees the conversation of the task that asked for it, and no other.
        with conversation("executor"):
            assert await asyncio.to_thread(say, opening("executor")) == "executor"
        with conversation("leaked"):
            plain = await asyncio.get_running_loop().run_in_executor(None, partial(say, opening("nobody")))
        assert plain == "nobody"

    def generators() -> None:
        running = [generator(f"generator-{number}") for number in range(EACH)]
        for _ in range(TURNS):
            for each in running:
                next(each)

    with ThreadPoolExecutor(EACH + 2) as pool:
        others = [pool.submit(asyncio.run, in_a_loop()), pool.submit(generators)]
        list(pool.map(thread, (f"thread-{number}" for number in range(EACH))))
        for other in others:
            other.result()

    sent = [request for server in (prefiller, one, two) for request in server.requests]
    for request in sent:
        named = request.headers["x-session-id"].rpartition("/")[0]
        whose = request.body["messages"][0]["content"].split(" ")[0]
        assert named == whose or (whose == "nobody" and named.startswith("anon-"))
    prefills = Counter(request.headers["x-session-id"] for request in prefiller.requests)
    assert set(prefills.values()) == {1}
    assert len(prefills) == 4 * EACH + 2
    decoders = {
        name: {record.decoder_id for record in conserve.turns.records if record.conversation_id == name}
        for name in {record.conversation_id for record in conserve.turns.records}
    }
    assert {len(found) for found in decoders.values()} == {1}
    assert {record.error for record in conserve.turns.records} == {""}
    at_rest(conserve)


def test_first_turns_of_one_lineage_at_once_are_prefilled_once(engine, front) -> None:
    """Threads and tasks of two event loops race for one conversation; real sockets, one prefill."""
    prefiller, decoder = engine(), engine()
    conserve = front(p0=prefiller, d0=decoder)

    def blocking(_: int) -> None:
        with conversation("shared"):
            conserve.openai_client(max_retries=0).chat.completions.create(model=MODEL, messages=opening("shared"))

    async def looped() -> None:
        client = conserve.async_openai_client(max_retries=0)
        with conversation("shared"):
            await asyncio.gather(
                *(client.chat.completions.create(model=MODEL, messages=opening("shared")) for _ in range(5))
            )

    with ThreadPoolExecutor(8) as pool:
        loops = [pool.submit(asyncio.run, looped()) for _ in range(2)]
        list(pool.map(blocking, range(6)))
        for loop in loops:
            loop.result()
    assert len(prefiller.requests) == 1
    assert len(decoder.requests) == 16
    assert conserve.broker.core.counters.migrations <= 1
    assert conserve.broker.core.lease_count() == 1

"""`conversation.stats()`, `ConServe.stats()` and `last_turn()`: what they count, where, and in how much memory."""

import asyncio
import contextvars
import threading

import pytest

from conserve_sdk import ConServe, ConversationStats, TurnRecord, conversation, last_turn
from conserve_sdk.telemetry import StatsBook, Tally
from conserve_sdk.telemetry import _stats as stats
from conserve_sdk.telemetry._stats import CONVERSATIONS_MAX, RECENT_MAX
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine

TINY = [{"role": "user", "content": "hello"}]


def record(conversation_id="c", **fields) -> TurnRecord:
    return TurnRecord(**{"conversation_id": conversation_id, "lineage": "l", **fields})


@pytest.fixture
def conserve():
    broker, engine = InMemoryBroker(), ScriptedEngine(then="answer")
    with ConServe(broker.url, broker_transport=broker, engine_transport=engine) as conserve:
        yield conserve


def ask(conserve, **options):
    return conserve.openai_client().chat.completions.create(model="test-model", messages=TINY, **options)


async def aask(conserve):
    return await conserve.async_openai_client().chat.completions.create(model="test-model", messages=TINY)


def in_new_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


# ---- the table ------------------------------------------------------------------------------------------------


def test_the_table_of_a_conversation(make_world) -> None:
    replies = [
        EngineReply.prefill(),
        EngineReply.chat(tool="add"),
        EngineReply.chat(cached_tokens=64, prompt_tokens=1300),
    ]
    world = make_world(engine=ScriptedEngine(*replies))
    question = {"role": "user", "content": "x" * 4000}
    world.turn(messages=[question])
    world.turn(messages=[question, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}])
    stats = world.conserve.stats("c1")
    decoder = world.engines_called[-1]
    lineage = stats.last.lineage
    head, *table = str(stats).splitlines()
    assert head == "conversation c1: 2 turns, 1 migration, 3 engine requests, 0 failovers, 0 errors"
    assert table[0] == "tokens: 1,400 prompt, of which 64 cached (4 %); 10 answer. Waited 0 ms for the broker"
    first = f"1 {lineage} migrate {decoder} p0 100 0 5 2 0 - tool_calls -"
    second = f"2 {lineage} migrate {decoder} - 1,300 64 5 1 0 0 stop -"
    titles = "turn lineage mode decoder prefiller prompt cached answer hops TTFT ms TTFET ms finish loss"
    assert [" ".join(line.split()) for line in table[1:]] == [titles, first, second]
    finish = table[1].index("finish")
    assert [line[finish:].split()[0] for line in table[2:]] == ["tool_calls", "stop"]  # columns stand under each other


def test_an_unknown_conversation_is_all_zero(conserve) -> None:
    stats = conserve.stats("nobody")
    assert stats == ConversationStats(conversation_id="nobody")
    assert stats.last is None
    assert str(stats).count("\n") == 1


def test_ids_are_looked_up_as_they_were_given(conserve) -> None:
    with conversation("größer\n"):
        ask(conserve)
    assert conserve.stats("größer\n").turns == 1


def test_losses_errors_and_old_turns() -> None:
    tally = Tally("c")
    for number in range(RECENT_MAX + 3):
        loss, error = "prefill_failed" if number % 2 else "", "" if number else "timeout"
        tally(record(turn=number + 1, loss=loss, error=error))
    tally(record("another"))
    stats = tally.stats()
    assert (stats.turns, len(stats.recent), stats.errors) == (RECENT_MAX + 3, RECENT_MAX, 1)
    assert stats.losses == {"prefill_failed": (RECENT_MAX + 3) // 2}
    lines = str(stats).splitlines()
    assert lines[2:4] == [f"lost: prefill_failed {stats.losses['prefill_failed']}", f"the last {RECENT_MAX} turns:"]


def test_memory_is_bounded() -> None:
    book = StatsBook()
    for number in range(CONVERSATIONS_MAX + 10):
        book(record(f"c{number}", tbt_us=(1, 2, 3)))
        book(record("busy"))
    assert book.stats("c0").turns == 0
    assert book.stats("busy").turns == CONVERSATIONS_MAX + 10
    assert book.stats(f"c{CONVERSATIONS_MAX + 9}").recent[0].tbt_us == ()


def test_a_book_adds_up_the_turns_of_many_threads() -> None:
    book = StatsBook()
    threads = [threading.Thread(target=lambda: [book(record(hops=2)) for _ in range(200)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (book.stats("c").turns, book.stats("c").hops) == (1600, 3200)


# ---- the block ------------------------------------------------------------------------------------------------


def test_a_block_counts_the_turns_made_inside(conserve) -> None:
    with conversation("c") as first:
        ask(conserve)
        ask(conserve, extra_headers={"X-ConServe-Conversation": "other"})
        with conversation("inner") as inner:
            ask(conserve)
        with conversation("c", lineage="sub") as sub:
            ask(conserve)
        assert sub.stats() == first.stats()
    with conversation("c") as second:
        ask(conserve)
    assert [block.stats().turns for block in (first, inner, second)] == [2, 1, 1]
    assert conserve.stats("c").turns == 3
    with first:
        ask(conserve)
    assert first.stats().turns == 3


def test_a_block_counts_its_tasks_and_a_stream_that_ends_later(conserve) -> None:
    async def main() -> None:
        async with conversation("c") as block:
            await asyncio.gather(*(aask(conserve) for _ in range(5)))
            client = conserve.async_openai_client()
            stream = await client.chat.completions.create(model="test-model", messages=TINY, stream=True)
        assert block.stats().turns == 5
        async for _ in stream:
            pass
        assert block.stats().turns == 6
        await conserve.aclose()

    asyncio.run(main())


# ---- last_turn ------------------------------------------------------------------------------------------------


def test_last_turn_in_a_block(conserve) -> None:
    ask(conserve)
    with conversation("c"):
        assert last_turn() is None
        ask(conserve)
        assert last_turn().conversation_id == "c"
        context = contextvars.copy_context()
        in_new_thread(lambda: context.run(ask, conserve, extra_headers={}))
        assert conserve.stats("c").turns == 2
        assert last_turn() == conserve.stats("c").last


def test_last_turn_of_a_thread_and_of_the_process(conserve) -> None:
    def own():
        ask(conserve, extra_headers={"X-ConServe-Conversation": "theirs"})
        return last_turn().conversation_id

    ask(conserve, extra_headers={"X-ConServe-Conversation": "mine"})
    assert in_new_thread(own) == "theirs"
    assert last_turn().conversation_id == "mine"
    assert in_new_thread(lambda: last_turn().conversation_id) == "theirs"  # it began none: the process's last


def test_last_turn_of_tasks_is_their_own(conserve) -> None:
    async def task(name: str) -> str:
        client = conserve.async_openai_client()
        for _ in range(3):
            headers = {"X-ConServe-Conversation": name}
            await client.chat.completions.create(model="test-model", messages=TINY, extra_headers=headers)
            await asyncio.sleep(0)
        return last_turn().conversation_id

    async def main() -> None:
        names = [f"task-{number}" for number in range(20)]
        assert await asyncio.gather(*map(task, names)) == names
        await conserve.aclose()

    asyncio.run(main())


def test_a_turn_that_still_streams_is_not_the_last(conserve) -> None:
    ask(conserve, extra_headers={"X-ConServe-Conversation": "done"})
    stream = ask(conserve, stream=True, extra_headers={"X-ConServe-Conversation": "streaming"})
    assert last_turn().conversation_id == "done"
    in_new_thread(lambda: list(stream))  # ends elsewhere, and still belongs to the context it was begun in
    assert last_turn().conversation_id == "streaming"


def test_a_forked_child_counts_on(fork_and_wait) -> None:
    book, tally = StatsBook(), Tally("c")

    def child() -> None:
        for count in (book, tally):
            count(record())
        assert book.stats("c").turns == tally.stats().turns == 2

    for count in (book, tally):
        count(record())
    with stats._guard.lock:  # another thread is adding up just then
        assert fork_and_wait(child) == 0
    assert book.stats("c").turns == tally.stats().turns == 1

"""Who is talking: the order of the sources, and a mark that survives tasks, threads and foreign contexts."""

import asyncio
import contextvars
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk.errors import ConfigError
from conserve_sdk.identity import (
    HEADER_CONVERSATION,
    HEADER_LINEAGE,
    HEADER_SESSION,
    WIRE_ID_MAX_CHARS,
    conversation,
    current_conversation,
    current_lineage,
    resolve_conversation,
    resolve_lineage,
    wire_id,
)
from conserve_sdk.protocol import LeaseRequest


@pytest.fixture
def langgraph_config(monkeypatch):
    """Stands where langchain_core keeps the config of the running node, whether or not it is installed."""
    variable: contextvars.ContextVar[object] = contextvars.ContextVar("config", default=None)
    module = types.ModuleType("langchain_core.runnables.config")
    module.var_child_runnable_config = variable
    monkeypatch.setitem(sys.modules, "langchain_core.runnables.config", module)
    return variable


class TestWireId:
    def test_plain_ids_stay_as_they_are(self) -> None:
        assert wire_id("ticket-17/a:b") == "ticket-17/a:b"

    @pytest.mark.parametrize("text", ["two words", "grüße", "x" * (WIRE_ID_MAX_CHARS + 1), "new\nline", "\ud800"])
    def test_others_are_hashed_the_same_way_every_time(self, text: str) -> None:
        assert re.fullmatch(r"h-[0-9a-f]{32}", wire_id(text))
        assert wire_id(text) == wire_id(text)
        assert wire_id(text) != wire_id(text + "x")

    @given(st.text(min_size=1))
    def test_every_text_becomes_an_id_the_protocol_takes(self, text: str) -> None:
        wired = wire_id(text)
        LeaseRequest(conversation_id=wired, lineage=wired, model="m")
        httpx2.Headers({HEADER_SESSION: f"{wired}/l-0123456789abcdef-01234567"})
        assert len(wired) <= WIRE_ID_MAX_CHARS
        assert wire_id(wired) == wired

    def test_an_empty_id_is_a_mistake(self) -> None:
        with pytest.raises(ConfigError, match="must not be empty"):
            wire_id("")


class TestConversationBlock:
    def test_nests_and_restores(self) -> None:
        assert current_conversation() is None
        with conversation("outer", lineage="main") as outer:
            assert (outer.conversation_id, current_lineage()) == ("outer", "main")
            with conversation("inner"):
                assert (current_conversation(), current_lineage()) == ("inner", None)
            assert (current_conversation(), current_lineage()) == ("outer", "main")
        assert (current_conversation(), current_lineage()) == (None, None)

    def test_one_object_can_be_entered_again(self) -> None:
        block = conversation("a")
        with block, block:
            assert current_conversation() == "a"
        assert current_conversation() is None

    async def test_works_as_async_with_and_reaches_tasks_and_to_thread(self) -> None:
        async def seen() -> str | None:
            await asyncio.sleep(0)
            return current_conversation()

        async with conversation("a"):
            assert await asyncio.create_task(seen()) == "a"
            assert await asyncio.to_thread(current_conversation) == "a"
        assert await seen() is None

    async def test_interleaved_tasks_do_not_see_each_other(self) -> None:
        async def one(name: str) -> list[str | None]:
            seen = []
            async with conversation(name):
                for _ in range(5):
                    await asyncio.sleep(0)
                    seen.append(current_conversation())
            return seen

        names = [f"c{i}" for i in range(100)]
        for name, seen in zip(names, await asyncio.gather(*map(one, names)), strict=True):
            assert seen == [name] * 5

    def test_plain_threads_do_not_inherit(self) -> None:
        with conversation("a"), ThreadPoolExecutor(1) as pool:
            assert pool.submit(current_conversation).result() is None

    def test_leaving_in_another_context_is_quiet_and_restores_the_value(self) -> None:
        block = conversation("a")
        context = contextvars.copy_context()
        context.run(block.__enter__)
        assert context.run(current_conversation) == "a"
        block.__exit__(None, None, None)  # another context than the one it was entered in
        assert current_conversation() is None

    def test_leaving_in_a_context_that_inherited_the_mark_removes_it(self) -> None:
        with conversation("outer"):
            block = conversation("a")
            block.__enter__()
            inherited = contextvars.copy_context()
            inherited.run(block.__exit__, None, None, None)
            assert inherited.run(current_conversation) == "outer"

    def test_leaving_elsewhere_never_touches_a_foreign_mark(self) -> None:
        block = conversation("a")
        contextvars.copy_context().run(block.__enter__)
        with conversation("b"):
            block.__exit__(None, None, None)
            assert current_conversation() == "b"

    async def test_an_abandoned_async_generator_closed_by_the_loop_is_quiet(self) -> None:
        async def items():
            with conversation("inside"):
                yield 1
                yield 2

        async def consume() -> None:
            async for _ in items():
                return

        await asyncio.create_task(consume())
        await asyncio.get_running_loop().shutdown_asyncgens()
        assert current_conversation() is None


class TestResolve:
    def test_order_of_the_sources(self, langgraph_config) -> None:
        langgraph_config.set({"configurable": {"thread_id": "thread"}})
        body = {"prompt_cache_key": "key"}
        headers = {HEADER_CONVERSATION: "header", HEADER_SESSION: "session"}
        with conversation("block"):
            assert resolve_conversation(headers, body) == "header"
            del headers[HEADER_CONVERSATION]
            assert resolve_conversation(headers, body) == "block"
        assert resolve_conversation(headers, body) == "session"
        assert resolve_conversation({}, body) == "thread"
        langgraph_config.set(None)
        assert resolve_conversation({}, body) == "key"
        assert resolve_conversation({}, {}) is None
        assert resolve_conversation({}) is None

    @pytest.mark.parametrize(
        "headers", [httpx2.Headers({"x-conserve-conversation": "a"}), {"x-conSERVE-conversation": "a"}]
    )
    def test_header_names_in_any_case(self, headers) -> None:
        assert resolve_conversation(headers) == "a"

    @pytest.mark.parametrize("value", [None, 7, "", ["k"]])
    def test_a_cache_key_that_is_no_text_is_no_id(self, value: object) -> None:
        assert resolve_conversation({}, {"prompt_cache_key": value}) is None

    def test_ids_are_made_fit_for_the_wire(self) -> None:
        assert resolve_conversation({}, {"prompt_cache_key": "two words"}) == wire_id("two words")

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"configurable": {"conserve_conversation_id": "own", "thread_id": "t"}}, "own"),
            ({"configurable": {"thread_id": 17}}, "17"),
            ({"configurable": {}, "metadata": {"session_id": "s", "thread_id": "t"}}, "s"),
            ({"configurable": {"thread_id": ""}, "metadata": {"thread_id": "t"}}, "t"),
            ({"configurable": None, "metadata": None}, None),
            ({}, None),
            ("not a mapping", None),
        ],
    )
    def test_langgraph_ids(self, langgraph_config, config: object, expected: str | None) -> None:
        langgraph_config.set(config)
        assert resolve_conversation({}) == expected

    def test_the_real_langchain_variable_is_read(self) -> None:
        config = pytest.importorskip("langchain_core.runnables.config")

        def inside() -> str | None:
            config.var_child_runnable_config.set({"configurable": {"thread_id": "real"}})
            return resolve_conversation({})

        assert contextvars.copy_context().run(inside) == "real"

    def test_without_langchain_nothing_is_imported(self, monkeypatch) -> None:
        monkeypatch.delitem(sys.modules, "langchain_core.runnables.config", raising=False)
        assert resolve_conversation({}) is None
        assert "langchain_core.runnables.config" not in sys.modules


class TestResolveLineage:
    def test_header_before_block(self) -> None:
        with conversation("c", lineage="block"):
            assert resolve_lineage({HEADER_LINEAGE: "header"}) == "header"
            assert resolve_lineage({}) == "block"
        assert resolve_lineage({}) is None

    def test_another_conversation_leaves_the_blocks_lineage_behind(self) -> None:
        with conversation("c", lineage="block"):
            assert resolve_lineage({HEADER_CONVERSATION: "other"}) is None

"""Who is talking: the order of the sources, and a mark that survives tasks, threads and foreign contexts."""

import asyncio
import contextlib
import contextvars
import inspect
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import httpx2
import opentelemetry.baggage as otel_baggage
import opentelemetry.baggage.propagation as otel_propagation
import opentelemetry.context as otel_context
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


@pytest.fixture
def baggage():
    """A block in which OpenTelemetry's baggage names a conversation."""

    @contextlib.contextmanager
    def named(value):
        token = otel_context.attach(otel_baggage.set_baggage("gen_ai.conversation.id", value))
        try:
            yield
        finally:
            otel_context.detach(token)

    return named


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


class TestThreadsAndGenerators:
    """Where a mark would be lost or seen by others, and what helps."""

    def test_one_object_in_many_threads_at_once(self) -> None:
        block, inside, seen = conversation("a"), threading.Barrier(2), []

        def enter_and_leave(outer: str) -> None:
            with conversation(outer):
                with block:
                    inside.wait(30)  # both are in
                    seen.append(current_conversation())
                    inside.wait(30)
                seen.append(current_conversation())

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(enter_and_leave, outer) for outer in ("x", "y")]:
                done.result(60)
        assert sorted(seen) == ["a", "a", "x", "y"]

    def test_a_block_takes_along_what_was_entered_inside_it_and_never_left(self) -> None:
        abandoned = conversation("inside")
        with conversation("outside"):
            abandoned.__enter__()
        assert current_conversation() is None
        with conversation("next"):
            abandoned.__exit__(None, None, None)  # late
            assert current_conversation() == "next"

    def test_a_wrapped_function_is_marked_in_a_pool(self) -> None:
        def seen(prefix: str, *, suffix: str) -> str:
            return f"{prefix}{current_conversation()}{suffix}"

        with ThreadPoolExecutor(2) as pool:
            names = [f"c{number}" for number in range(20)]
            futures = [pool.submit(conversation(name).wrap(seen), "<", suffix=">") for name in names]
            assert [future.result(30) for future in futures] == [f"<{name}>" for name in names]
            assert pool.submit(current_conversation).result(30) is None  # nothing is left in the pool's threads

    def test_a_copied_context_is_marked_in_a_pool(self) -> None:
        with conversation("a"), ThreadPoolExecutor(1) as pool:
            assert pool.submit(contextvars.copy_context().run, current_conversation).result(30) == "a"

    def test_a_wrapped_function_that_raises_leaves_no_mark(self) -> None:
        @conversation("a").wrap
        def fail() -> None:
            raise KeyError(current_conversation())

        with pytest.raises(KeyError, match="a"):
            fail()
        assert current_conversation() is None
        assert fail.__name__ == "fail"

    async def test_a_wrapped_coroutine_function_stays_one(self) -> None:
        @conversation("a").wrap
        async def seen() -> str | None:
            await asyncio.sleep(0)
            return current_conversation()

        assert inspect.iscoroutinefunction(seen)
        assert await seen() == "a"
        assert current_conversation() is None

    async def test_what_a_wrapped_lambda_awaits_is_marked(self) -> None:
        async def seen(prefix: str) -> str:
            await asyncio.sleep(0)
            return f"{prefix}{current_conversation()}"

        names = [f"c{number}" for number in range(10)]
        marked = [conversation(name).wrap(lambda: seen("in "))() for name in names]
        assert await asyncio.gather(*marked) == [f"in {name}" for name in names]

    async def test_inside_a_generator_a_block_is_visible_to_its_consumer(self) -> None:
        """What `wrap` is for; Python gives a generator no context of its own (PEP 567)."""

        async def items():
            with conversation("inside"):
                yield current_conversation()

        seen = [(item, current_conversation()) async for item in items()]
        assert seen == [("inside", "inside")]

    def test_a_wrapped_generator_keeps_its_mark_to_itself(self) -> None:
        notes = []

        @conversation("inside").wrap
        def items(first):
            try:
                got = yield (first, current_conversation())
                try:
                    yield (got, current_conversation())
                except KeyError:
                    yield ("caught", current_conversation())
                return current_conversation()
            finally:
                notes.append(current_conversation())

        with conversation("outside"):
            walk = items(1)
            assert next(walk) == (1, "inside")
            assert current_conversation() == "outside"
            assert walk.send("sent") == ("sent", "inside")
            assert walk.throw(KeyError()) == ("caught", "inside")
            with pytest.raises(StopIteration) as end:
                next(walk)
            assert end.value.value == "inside"
            left = items(2)
            next(left)
            left.close()
            assert current_conversation() == "outside"
        assert notes == ["inside", "inside"]

    async def test_a_wrapped_async_generator_keeps_its_mark_to_itself(self) -> None:
        notes = []

        @conversation("inside").wrap
        async def items(first):
            try:
                got = yield (first, current_conversation())
                await asyncio.sleep(0)
                try:
                    yield (got, current_conversation())
                except KeyError:
                    yield ("caught", current_conversation())
            finally:
                notes.append(current_conversation())

        with conversation("outside"):
            walk = items(1)
            assert await anext(walk) == (1, "inside")
            assert current_conversation() == "outside"
            assert await walk.asend("sent") == ("sent", "inside")
            assert await walk.athrow(KeyError()) == ("caught", "inside")
            with pytest.raises(StopAsyncIteration):
                await anext(walk)
            left = items(2)
            await anext(left)
            await left.aclose()
            assert current_conversation() == "outside"
        assert notes == ["inside", "inside"]

    def test_a_block_can_be_pickled(self) -> None:
        with pickle.loads(pickle.dumps(conversation("two words", lineage="main"))) as again:
            assert (current_conversation(), current_lineage()) == (wire_id("two words"), "main")
        assert again.conversation_id == wire_id("two words")


class TestResolve:
    def test_order_of_the_sources(self, langgraph_config, baggage) -> None:
        langgraph_config.set({"configurable": {"thread_id": "thread"}, "metadata": {"session_id": "metadata"}})
        body = {"prompt_cache_key": "key"}
        headers = {HEADER_CONVERSATION: "header", HEADER_SESSION: "session"}
        with conversation("block"):
            assert resolve_conversation(headers, body) == "header"
            del headers[HEADER_CONVERSATION]
            assert resolve_conversation(headers, body) == "block"
        assert resolve_conversation(headers, body) == "session"
        assert resolve_conversation({}, body) == "thread"
        langgraph_config.set({"metadata": {"session_id": "metadata"}})
        assert resolve_conversation({}, body) == "metadata"
        langgraph_config.set(None)
        with baggage("baggage"):
            assert resolve_conversation({}, body) == "key"
            assert resolve_conversation({}, {}) == "baggage"
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


class TestBaggage:
    """Against the real opentelemetry-api."""

    @pytest.mark.parametrize(("value", "expected"), [("a", "a"), (17, "17"), ("", None), (None, None)])
    def test_values(self, baggage, value: object, expected: str | None) -> None:
        with baggage(value):
            assert resolve_conversation({}) == expected

    def test_values_that_came_with_a_request_are_made_fit_for_the_wire(self) -> None:
        context = otel_propagation.W3CBaggagePropagator().extract({"baggage": "gen_ai.conversation.id=two%20words"})
        token = otel_context.attach(context)
        try:
            assert resolve_conversation({}) == wire_id("two words")
        finally:
            otel_context.detach(token)

    def test_without_opentelemetry_nothing_is_imported(self) -> None:
        program = textwrap.dedent("""
            import sys
            from conserve_sdk.identity import resolve_conversation
            import conserve_sdk.client
            assert resolve_conversation({}, {}) is None
            print([name for name in sys.modules if name.partition(".")[0] in ("opentelemetry", "langchain_core")])
        """)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
        assert done.stdout.strip() == "[]"


class TestResolveLineage:
    def test_header_before_block(self) -> None:
        with conversation("c", lineage="block"):
            assert resolve_lineage({HEADER_LINEAGE: "header"}) == "header"
            assert resolve_lineage({}) == "block"
        assert resolve_lineage({}) is None

    def test_another_conversation_leaves_the_blocks_lineage_behind(self) -> None:
        with conversation("c", lineage="block"):
            assert resolve_lineage({HEADER_CONVERSATION: "other"}) is None

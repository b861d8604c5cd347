"""One broker in front of an emulated fleet, and one script for both colours of a client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextvars import copy_context
from typing import Any

import openai
import pytest

from conserve_lab.emulator import default_fleet
from conserve_lab.stack import LocalStack
from conserve_sdk import ConServe
from conserve_sdk.telemetry import TurnCollector, TurnRecord

LONG = "You keep the files of an office in order. " * 100


class Colour:
    """A client, blocking or async, that the same lines drive: calls return, streams are read to their end."""

    def __init__(self, stack: LocalStack, *, is_async: bool, **options: Any) -> None:
        self.stack = stack
        self.turns = TurnCollector()
        self.conserve = ConServe(stack.broker_url, on_turn=self.turns, **options)
        self.is_async = is_async
        self._runner = asyncio.Runner()
        self.client: Any = self.conserve.async_openai_client() if is_async else self.conserve.openai_client()

    def call(self, make: Callable[[Any], Any], client: Any = None) -> Any:
        """What a method of the client returns."""
        made = make(client or self.client)
        return self._run(_awaited(made)) if self.is_async else made

    def items(self, make: Callable[[Any], Any]) -> list[Any]:
        """What iterating over it gives, inside `with` where it is a context manager."""

        async def looped() -> list[Any]:
            made = make(self.client)
            made = await made if asyncio.iscoroutine(made) else made
            async with made as stream:
                return [item async for item in stream]

        def blocking() -> list[Any]:
            with make(self.client) as stream:
                return list(stream)

        return self._run(looped()) if self.is_async else blocking()

    def inside(self, make: Callable[[Any], Any], use: Callable[[Any], Any]) -> Any:
        """What `use` gives inside `with make(client)`."""

        async def looped() -> Any:
            async with make(self.client) as entered:
                found = use(entered)
                return [item async for item in found] if hasattr(found, "__aiter__") else await _awaited(found)

        def blocking() -> Any:
            with make(self.client) as entered:
                found = use(entered)
                return list(found) if hasattr(found, "__next__") else found

        return self._run(looped()) if self.is_async else blocking()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        # A runner keeps the context of its first run: the conversation around this call would be lost.
        return self._runner.run(work, context=copy_context())

    def chat(self, content: str = "Hello.", *, instructions: str = LONG, **options: Any) -> dict[str, Any]:
        """Fields of a chat request."""
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": content}]
        return {"model": self.stack.model, "messages": messages, "max_tokens": 40, **options}

    @property
    def records(self) -> list[TurnRecord]:
        return self.turns.records

    def close(self) -> None:
        if self.is_async:
            self._runner.run(self.conserve.aclose())
        self._runner.close()
        self.conserve.close()


async def _awaited(made: Any) -> Any:
    return await made if hasattr(made, "__await__") else made


@pytest.fixture(scope="module")
def stack() -> Iterator[LocalStack]:
    fleet = default_fleet(time_scale=0.0, tool_calls_min=1, tool_calls_max=1)
    lives = {"lease": {"ttl_ms": 3_600_000}}  # no machine is so busy that a lease ends between two turns
    with LocalStack(fleet=fleet, preset="paper", settings=lives) as stack:
        yield stack


@pytest.fixture
def fresh_stack() -> Iterator[LocalStack]:
    """A stack that a test may break."""
    with LocalStack(fleet=default_fleet(time_scale=0.0), preset="paper") as stack:
        yield stack


def _colour(stack: LocalStack, request: pytest.FixtureRequest) -> Iterator[Colour]:
    colour = Colour(stack, is_async=request.param == "async")
    yield colour
    colour.close()


@pytest.fixture(params=["sync", "async"])
def colour(stack: LocalStack, request: pytest.FixtureRequest) -> Iterator[Colour]:
    yield from _colour(stack, request)


@pytest.fixture(params=["sync", "async"])
def fresh_colour(fresh_stack: LocalStack, request: pytest.FixtureRequest) -> Iterator[Colour]:
    yield from _colour(fresh_stack, request)


@pytest.fixture
def direct(stack: LocalStack) -> Iterator[openai.OpenAI]:
    """A client that knows nothing of ConServe, on one engine."""
    with openai.OpenAI(base_url=f"{stack.fleet.decoders[-1].url}/v1", api_key="x") as client:
        yield client

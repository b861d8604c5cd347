"""Fixtures of the SDK's tests."""

import asyncio
import json

import openai
import pytest

from conserve_sdk import ConServe, TurnCollector, conversation
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import FakeClock, InMemoryBroker, ScriptedEngine
from tests.support.processes import fork_and_wait

from .callers import Colour

__all__ = ["fork_and_wait"]


@pytest.fixture(params=["sync", "async"])
def colour(request) -> Colour:
    """A client of the broker; every test that uses it runs in both colours."""
    return Colour(request.param)


class Outcome:
    """What the application saw of one turn."""

    def __init__(self, *, text="", headers=None, error=None, tool="") -> None:
        self.text, self.headers, self.error, self.tool = text, headers or {}, error, tool

    def __repr__(self) -> str:
        return f"Outcome({self.text!r}, {self.error!r}, {dict(self.headers)!r})"


class World:
    """A broker, engines, a clock and one ConServe object, spoken to in one colour through openai's client."""

    def __init__(self, colour, *, engine=None, broker=None, settings=None, **options) -> None:
        self.colour = colour
        self.clock = broker.clock if broker else FakeClock()
        self.broker = broker or InMemoryBroker(settings=settings or BrokerSettings(placement=PAPER), clock=self.clock)
        self.engine = engine or ScriptedEngine(then="answer")
        self.turns = TurnCollector()
        options.setdefault("engine_transport", self.engine)
        options.setdefault("on_turn", self.turns)
        options.setdefault("clock_us", lambda: self.clock.now_ms() * 1000)
        self.conserve = ConServe(
            self.broker.url,
            broker_transport=self.broker,
            **options,
        )
        self.runner = asyncio.Runner()

    def run(self, blocking, coroutine):
        """Call one of two: the blocking function, or the async one in this world's event loop."""
        return blocking() if self.colour == "sync" else self.runner.run(coroutine())

    def turn(
        self, text="hello " * 400, *, conversation_id="c1", stream=False, max_retries=0, messages=None, **options
    ) -> Outcome:
        options.setdefault("model", "test-model")
        options["messages"] = messages or [{"role": "user", "content": text}]
        return self.run(
            lambda: self._turn(conversation_id, stream, max_retries, options),
            lambda: self.aturn(conversation_id, stream, max_retries, options),
        )

    def _turn(self, conversation_id, stream, max_retries, options) -> Outcome:
        client = self.conserve.openai_client(max_retries=max_retries)
        try:
            with conversation(conversation_id):
                raw = client.chat.completions.with_raw_response.create(stream=stream, **options)
            answer = raw.parse()
            return _outcome(raw, list(answer) if stream else answer)
        except openai.OpenAIError as error:
            return Outcome(error=error)

    async def aturn(self, conversation_id, stream, max_retries, options) -> Outcome:
        client = self.conserve.async_openai_client(max_retries=max_retries)
        try:
            with conversation(conversation_id):
                raw = await client.chat.completions.with_raw_response.create(stream=stream, **options)
            answer = raw.parse()
            return _outcome(raw, [chunk async for chunk in answer] if stream else answer)
        except openai.OpenAIError as error:
            return Outcome(error=error)

    @property
    def engines_called(self) -> list[str]:
        return [call.engine for call in self.engine.calls]

    @property
    def record(self):
        """The newest turn's record."""
        return self.turns.records[-1]

    def reports(self, kind=None) -> list[dict]:
        """What the broker was told, after a flush."""
        assert self.conserve.flush()
        batches = [json.loads(e.request) for e in self.broker.exchanges if e.path == "/v1/reports" and e.status == 200]
        reports = [report for batch in batches for report in batch["reports"]]
        return [report for report in reports if kind in (None, report["kind"])]

    def asked(self, path="/v1/leases") -> int:
        return sum(exchange.path == path and exchange.method == "POST" for exchange in self.broker.exchanges)

    def close(self) -> None:
        self.run(self.conserve.close, self.conserve.aclose)
        self.runner.close()


def _outcome(raw, answer) -> Outcome:
    if isinstance(answer, list):
        deltas = [chunk.choices[0].delta for chunk in answer if chunk.choices]
        calls = [call for delta in deltas for call in delta.tool_calls or ()]
        return Outcome(
            text="".join(delta.content or "" for delta in deltas),
            headers=raw.headers,
            tool=calls[0].function.name if calls else "",
        )
    message = answer.choices[0].message
    tool = message.tool_calls[0].function.name if message.tool_calls else ""
    return Outcome(text=message.content or "", headers=raw.headers, tool=tool)


def _maker(colour):
    worlds = []

    def make(**options) -> World:
        worlds.append(World(colour, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture(params=["sync", "async"])
def make_world(request):
    """Make worlds of one colour; every test that uses it runs in both."""
    yield from _maker(request.param)


@pytest.fixture
def make_async_world():
    """Make async worlds, for what only tasks can do."""
    yield from _maker("async")


@pytest.fixture
def world(make_world):
    """A world with one prefiller and two decoders, where every first turn migrates."""
    return make_world()

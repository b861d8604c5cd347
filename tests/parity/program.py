"""One program for both colours of the SDK, and the account of all that it caused.

A scene is written once, as a coroutine over a `Program`. Its async run awaits what the async entry points return; its
blocking run never suspends, because every step has its result at once, and so no event loop is there that could help.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import copy_context
from dataclasses import asdict
from typing import Any

import openai
from pydantic import BaseModel

from conserve_sdk import ConServe, TurnCollector, conversation, last_turn
from conserve_sdk import client as client_module
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import InMemoryBroker, ScriptedEngine
from conserve_sdk.transport import Settings
from tests.support.dialogue import follow_up

__all__ = ["COLOURS", "MODEL", "Program", "play"]

COLOURS = ("sync", "async")
MODEL = "test-model"

_TWIN_NAMES = {"release": "arelease", "park": "apark", "close": "aclose", "openai_client": "async_openai_client"}
_TWIN_NAMES |= {"http_client": "async_http_client", "transport": "async_transport"}

_OF_THE_COLOUR = {"x-stainless-async", "user-agent"}
"""Headers in which openai's own clients tell their colour."""
_WAITS = re.compile(r'(wait_ms[\\"]+: ?)[1-9]\d*')
"""How long a request at the broker may wait: what is left of it by the wall clock."""
_MADE_UP = re.compile(r"anon-[0-9a-f]{24}|\b[0-9a-f]{32}\b|eyJ[\w-]+\.[\w-]+\.[\w-]+")
"""Ids and tokens that are new in every run; the account names them in the order of their appearance."""


class Program:
    """What a scene may do, the same in both colours.

    Attributes:
        broker, engine, conserve: what stands behind the client.
        client: openai's, of this colour.
        seen: what the application got, in order.
    """

    def __init__(self, colour: str, *, broker=None, engine=None, **options) -> None:
        self.colour = colour
        self.broker = broker or InMemoryBroker(settings=BrokerSettings(placement=PAPER))
        self.engine = engine or ScriptedEngine(then="answer", clock=self.broker.clock)
        self.engine._clock = self.broker.clock
        self.turns = TurnCollector()
        self.seen: list[Any] = []
        self.conserve = self.another(on_turn=self.turns, **options)
        self.client = self.twin("openai_client")(max_retries=0)

    def another(self, **options) -> ConServe:
        """One more `ConServe` object before the same broker and engines, as another process would have."""
        clock = self.broker.clock
        return ConServe(
            self.broker.url,
            **{"broker_transport": self.broker, "engine_transport": self.engine, **options},
            clock_us=lambda: clock.now_ms() * 1000,
        )

    # ---- colour -----------------------------------------------------------------------------------------------

    def twin(self, name: str, of: Any = None) -> Callable[..., Any]:
        """The method of this colour: `release` is `arelease` in the async one."""
        return getattr(of or self.conserve, _TWIN_NAMES[name] if self.colour == "async" else name)

    async def value(self, made: Any) -> Any:
        """The result of a call: awaited where it has to be."""
        return await made if hasattr(made, "__await__") else made

    async def each(self, made: Any) -> list[Any]:
        """All items of a stream."""
        return [item async for item in made] if hasattr(made, "__aiter__") else list(made)

    @asynccontextmanager
    async def inside(self, manager: Any):
        """`with` or `async with`."""
        if self.colour == "async":
            async with manager as entered:
                yield entered
        else:
            with manager as entered:
                yield entered

    # ---- steps ------------------------------------------------------------------------------------------------

    async def attempt(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Do it and put on record what came of it, an answer or an exception; tell the broker of the turns so far."""
        try:
            got = await work()
        except Exception as error:
            self.seen.append(_told(error))
            got = error
        else:
            self.seen.append(_plain(got))
        self.conserve.flush()
        return got

    async def call(self, path: str, *, client: Any = None, **fields: Any) -> Any:
        """Call a method of openai's client, such as `chat.completions.create`."""
        return await self.attempt(lambda: self.value(self._method(path, client)(**_model(fields))))

    async def read(self, path: str, *, client: Any = None, **fields: Any) -> Any:
        """Call it and read its stream to the end."""

        async def work() -> list[Any]:
            return await self.each(await self.value(self._method(path, client)(**_model(fields))))

        return await self.attempt(work)

    async def within(self, path: str, use: Callable[[Any], Coroutine[Any, Any, Any]], **fields: Any) -> Any:
        """Enter what it returns and do something with it."""

        async def work() -> Any:
            async with self.inside(self._method(path, None)(**_model(fields))) as entered:
                return await use(entered)

        return await self.attempt(work)

    async def ask(self, turn: int = 0, *, name: str = "c1", stream: bool = False, **fields: Any) -> Any:
        """One turn of a chat."""
        fields.setdefault("messages", follow_up(turn))
        with conversation(name):
            step = self.read if stream else self.call
            return await step("chat.completions.create", stream=stream, **fields)

    async def do(self, name: str, *arguments: Any, of: Any = None, **fields: Any) -> Any:
        """Call a method of the `ConServe` object, in this colour."""
        return await self.attempt(lambda: self.value(self.twin(name, of)(*arguments, **fields)))

    async def get(self, path: str) -> Any:
        """Any other request."""

        async def work() -> Any:
            answer = await self.value(self.twin("http_client")().get(path))
            return answer.status_code, answer.json()

        return await self.attempt(work)

    def _method(self, path: str, client: Any) -> Callable[..., Any]:
        found = client or self.client
        for name in path.split("."):
            found = getattr(found, name)
        return found

    # ---- the account ------------------------------------------------------------------------------------------

    @property
    def engines_called(self) -> list[str]:
        return [call.engine for call in self.engine.calls]

    @property
    def errors(self) -> list[str]:
        """How the turns ended."""
        return [record.error for record in self.turns.records]

    def account(self, warnings: list[str]) -> dict[str, Any]:
        """All that happened, without what is made up anew in every run."""
        self.conserve.flush()
        told = [json.loads(e.request) for e in self.broker.exchanges if e.path == "/v1/reports" and e.status == 200]
        account = {
            "seen": self.seen,
            "engines": [_engine_call(call) for call in self.engine.calls],
            "broker": [
                [exchange.method, exchange.path, exchange.status, exchange.request.decode()]
                for exchange in self.broker.exchanges
                if exchange.path not in ("/v1/reports", "/v1/renewals")
            ],
            "reports": [report for batch in told for report in batch["reports"]],
            "records": [asdict(record) for record in self.turns.records],
            "leases": [str(lease) for lease in self.broker.core.leases()],
            "warnings": warnings,
        }
        return json.loads(_renamed(json.dumps(account, default=str)))


def play(scene: Callable[[Program], Coroutine[Any, Any, None]], colour: str, options: dict, caplog) -> dict[str, Any]:
    """Run a scene in one colour and return its account."""
    caplog.clear()
    program = Program(colour, **options)
    key = client_module._key(Settings.resolve(program.broker.url, {}), {})
    client_module._shared[key] = program.conserve  # what `connect` and `openai_client` find
    try:
        with caplog.at_level(logging.WARNING, logger="conserve_sdk"):
            if colour == "async":
                asyncio.run(_played(scene, program))
            else:
                copy_context().run(_without_a_loop, _played(scene, program))
        warnings = [record.getMessage() for record in caplog.records if record.name == "conserve_sdk.turn"]
        return program.account(warnings)
    finally:
        del client_module._shared[key]
        program.conserve.close()


async def _played(scene: Callable[[Program], Coroutine[Any, Any, None]], program: Program) -> None:
    async with AsyncExitStack() as stack:
        if program.colour == "async":
            stack.push_async_callback(program.conserve._runtime.async_engines.aclose)
        await scene(program)
        program.seen.append(_plain(last_turn()))


def _without_a_loop(scene: Coroutine[Any, Any, None]) -> None:
    try:
        scene.send(None)
    except StopIteration:
        return
    scene.close()
    raise AssertionError("a blocking step had to be waited for")


def _model(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": MODEL, **fields}


def _engine_call(call) -> dict[str, Any]:
    headers = {name: value for name, value in sorted(call.headers.items()) if name not in _OF_THE_COLOUR}
    return {
        "to": [call.engine, call.method, call.path],
        "headers": headers,
        "content": call.content.decode(),
        "timeout": call.timeout,
    }


def _told(error: BaseException) -> dict[str, Any]:
    names = ("status_code", "code", "reason", "retry_after_ms", "engine_id", "key", "body")
    facts = {name: str(getattr(error, name)) for name in names if hasattr(error, name)}
    cause = error.__cause__
    return {
        "raised": type(error).__name__,
        "says": str(error),
        "is": [kind.__name__ for kind in (openai.OpenAIError, openai.APIError) if isinstance(error, kind)],
        **facts,
        "because": _told(cause) if cause is not None else None,
    }


def _plain(got: Any) -> Any:
    if isinstance(got, BaseModel):
        return got.model_dump(mode="json", warnings=False)
    if isinstance(got, list | tuple):
        return [_plain(item) for item in got]
    if hasattr(got, "http_response"):  # a raw response
        headers = {name: value for name, value in got.headers.items() if name.startswith("x-conserve")}
        return [got.status_code, headers]
    return str(got) if got is not None else None


def _renamed(text: str) -> str:
    names: dict[str, str] = {}
    text = _WAITS.sub(r"\1-1", text)  # -1: some
    return _MADE_UP.sub(lambda found: names.setdefault(found[0], f"made-up-{len(names) + 1}"), text)

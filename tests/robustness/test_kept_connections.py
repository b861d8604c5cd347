"""Streams that were read to their end leave their connection to the next, on every route and in both colours."""

from __future__ import annotations

import asyncio

import httpx2
import pytest

from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk import ConServe, conversation
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import InMemoryBroker
from conserve_sdk.transport import _pools
from tests.support.loopback import MODEL, LoopbackEngine, specs

STREAMS = 5
ASK = {
    "chat": lambda client: client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=6, stream=True
    ),
    "completions": lambda client: client.completions.create(model=MODEL, prompt="hi", max_tokens=6, stream=True),
    "responses": lambda client: client.responses.create(model=MODEL, input="hi", max_output_tokens=6, stream=True),
}


@pytest.fixture
def counted(monkeypatch):
    """An emulated engine behind `ConServe`, and the connections that were made to it."""
    monkeypatch.setattr(_pools, "LIMITS", httpx2.Limits(keepalive_expiry=None))  # however slow the machine is
    fleet = default_fleet(prefillers=0, decoders=1, time_scale=0.0, model=MODEL, tool_calls_min=0, tool_calls_max=0)
    made: list[int] = []
    with EmulatedFleet(fleet) as running:
        (engine,) = running.engines
        _watch(engine, made)
        broker = InMemoryBroker(_specs(engine.url), settings=BrokerSettings(placement=PAPER))
        with ConServe(broker.url, broker_transport=broker) as conserve:
            yield conserve, made


def _specs(url: str):
    class At(LoopbackEngine):
        def __init__(self) -> None:
            self.url = url

    return specs(("d0", At()))


def _watch(engine, made: list[int]) -> None:
    """Note the client's port of every request that comes in."""
    server = engine.engine_on_loop._server
    real = server._server.config.loaded_app

    async def noting(scope, receive, send) -> None:
        made.append(scope["client"][1])
        await real(scope, receive, send)

    server._server.config.loaded_app = noting


@pytest.mark.parametrize("route", list(ASK))
@pytest.mark.parametrize("colour", ["sync", "async"])
def test_five_streams_one_connection(counted, route, colour) -> None:
    conserve, made = counted

    def blocking() -> None:
        client = conserve.openai_client(max_retries=0)
        for _ in range(STREAMS):
            with conversation("c"):
                assert list(ASK[route](client))

    async def looped() -> None:
        client = conserve.async_openai_client(max_retries=0)
        for _ in range(STREAMS):
            with conversation("c"):
                assert [event async for event in await ASK[route](client)]

    blocking() if colour == "sync" else asyncio.run(looped())
    assert len(made) == STREAMS
    assert len(set(made)) == 1

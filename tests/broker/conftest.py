"""Servers for the tests of this folder: real HTTP on loopback, answers chosen by the test."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from conserve_broker.journal import Journal

VLLM_PAGE = Path(__file__).with_name("data").joinpath("vllm-0.32.0-decoder.metrics").read_bytes()
BUDGET_S = 30.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a journal may be."""
    return tmp_path / "leases.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    """A journal that nothing was written to."""
    journal = Journal.open(path)
    yield journal
    journal.close()


class PageEngine:
    """The three pages that a broker asks an engine for, as a test wants them, over real HTTP."""

    def __init__(self) -> None:
        self.page = VLLM_PAGE
        self.models: Any = {"data": [{"id": "conserve-tiny", "max_model_len": 2048}]}
        self.status: dict[str, int] = {}
        self.asked: list[str] = []
        self.in_flight = 0
        self.in_flight_max = 0
        self.hang = False
        self.reached = threading.Event()
        self.url = ""

    def app(self) -> Starlette:
        return Starlette(routes=[Route(path, self._answer) for path in ("/health", "/metrics", "/v1/models")])

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        self.asked.append(path)
        self.reached.set()
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight, self.in_flight_max)
        try:
            while self.hang:
                if await request.is_disconnected():
                    break
                await asyncio.sleep(0.01)
        finally:
            self.in_flight -= 1
        status = self.status.get(path, 200)
        if path == "/health" or status != 200:
            return Response(status_code=status)
        if path == "/metrics":
            return StreamingResponse(self._chunks(), media_type="text/plain")
        body = self.models if isinstance(self.models, bytes) else json.dumps(self.models).encode()
        return Response(body, media_type="application/json")

    async def _chunks(self) -> AsyncIterator[bytes]:
        step = 256 * 1024
        for start in range(0, len(self.page), step):
            yield self.page[start : start + step]


@contextlib.contextmanager
def serving(engine: PageEngine) -> Iterator[PageEngine]:
    listener = socket.create_server(("127.0.0.1", 0))
    engine.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(engine.app(), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + BUDGET_S
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield engine
    finally:
        engine.hang = False
        server.should_exit = True
        thread.join(BUDGET_S)
        listener.close()


@pytest.fixture
def page_engines() -> Iterator[Callable[[], PageEngine]]:
    """Starts engines that serve pages; each call makes another one."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(serving(PageEngine()))

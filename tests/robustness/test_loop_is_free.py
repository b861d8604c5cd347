"""A running event loop is never blocked by the SDK, however long broker and engines take.

Proved by cause and effect, not by a stopwatch: what the loop waits for answers only after the loop has turned many
times meanwhile. A call that blocked the loop would never come back.
"""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import blockbuster
import httpx2
import pytest

from conserve_sdk import ConServe, TurnCollector, conversation
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import InMemoryBroker
from tests.support.loopback import MODEL, PATIENCE_S, specs

TICKS = 50
MESSAGES = [{"role": "user", "content": "hello " * 400}]


class GatedBroker:
    """The in-memory broker behind a real socket; it answers once the loop has ticked on while it was asked."""

    def __init__(self, broker: InMemoryBroker) -> None:
        self.broker, self.ticks, self.answered = broker, 0, []
        self.ticked = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def __getattr__(self, name: str):
                if name.startswith("do_"):  # every method alike
                    return self.serve
                raise AttributeError(name)

            def serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                with outer.ticked:
                    seen = outer.ticks
                    assert outer.ticked.wait_for(lambda: outer.ticks >= seen + TICKS, timeout=PATIENCE_S)
                url = f"{outer.broker.url}{self.path}"
                request = httpx2.Request(self.command, url, headers=dict(self.headers), content=body)
                answer = outer.broker.handle_request(request)
                content = answer.read()
                outer.answered.append(f"{self.command} {self.path.split('?')[0].rsplit('/', 1)[-1]}")
                self.send_response(answer.status_code)
                self.send_header("content-type", answer.headers.get("content-type", "application/json"))
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    async def tick(self) -> None:
        """The heartbeat of the loop under test."""
        while True:
            with self.ticked:
                self.ticks += 1
                self.ticked.notify_all()
            await asyncio.sleep(0.001)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def gated(engine):
    servers = engine(), engine(), engine()
    broker = InMemoryBroker(
        specs(*zip(("p0", "d0", "d1"), servers, strict=True)), settings=BrokerSettings(placement=PAPER)
    )
    running = GatedBroker(broker)
    running.engines = servers
    yield running
    running.close()


async def test_no_call_to_the_broker_blocks_a_running_loop(gated) -> None:
    """Acquire, supersede, park, the reports before it, release, the list of engines, and the last reports at close."""
    turns = TurnCollector()
    heart = asyncio.ensure_future(gated.tick())
    async with ConServe(gated.url, on_turn=turns) as conserve:
        client = conserve.async_openai_client(max_retries=0)
        await client.models.list()
        with conversation("c1"):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        gated.engines[1 if turns.records[0].decoder_id == "d0" else 2].script.append("503")
        with conversation("c1"):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert await conserve.apark("c1") == 1
        assert await conserve.arelease("c1") == 1
        with conversation("c2"):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    heart.cancel()
    assert [record.error for record in turns.records] == ["", "", ""]
    assert turns.records[1].failovers == 1
    asked = set(gated.answered)
    assert {"GET engines", "POST leases", "POST supersede", "POST park", "POST reports"} <= asked, asked
    assert any(call.startswith("DELETE") for call in asked), asked


async def test_a_turn_makes_no_blocking_call(stack) -> None:
    """Every blocking system call in the loop's thread raises while the guard is up."""
    conserve = ConServe(stack.broker_url)
    client = conserve.async_openai_client(max_retries=0)

    async def turns() -> None:
        messages = list(MESSAGES)
        for stream in (False, True):
            with conversation(f"guarded-{stream}"):
                answer = await client.chat.completions.create(
                    model=stack.model, messages=messages, max_tokens=4, stream=stream
                )
                if stream:
                    assert [chunk async for chunk in answer]

    await turns()  # what is imported and read at the first use is not the turn's
    with blockbuster.blockbuster_ctx() as guard:
        with pytest.raises(blockbuster.BlockingError):
            await _sleeps_badly()
        await turns()
        assert await conserve.apark("guarded-True") == 1
        assert await conserve.arelease("guarded-True") == 1
        await conserve.aclose(release=True)
        guard.deactivate()


async def _sleeps_badly() -> None:
    import time

    time.sleep(0.001)  # noqa: ASYNC251 -- the guard must see this one


async def test_the_body_of_a_gated_report_is_whole(gated) -> None:
    """The gate itself passes bodies on unchanged, or the test above would prove nothing."""
    heart = asyncio.ensure_future(gated.tick())
    async with ConServe(gated.url) as conserve:
        with conversation("c1"):
            await conserve.async_openai_client().chat.completions.create(model=MODEL, messages=MESSAGES)
    heart.cancel()
    reports = [json.loads(e.request) for e in gated.broker.exchanges if e.path == "/v1/reports"]
    kinds = [report["kind"] for batch in reports for report in batch["reports"]]
    assert sorted(kinds) == ["turn_finished", "turn_started"]

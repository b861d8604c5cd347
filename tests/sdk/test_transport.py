"""The transport pair on real sockets: bytes, connections, event loops, processes."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import openai
import pytest

from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk import (
    AsyncConServeTransport,
    ConServe,
    ConServeTransport,
    LeaseClosed,
    Timeouts,
    TurnCollector,
    conversation,
)
from conserve_sdk.core import PAPER, BrokerSettings, EngineSpec, Role
from conserve_sdk.core.units import EngineId, ModelName, Ms, Tokens, TransferGroup
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine, deny_network
from conserve_sdk.transport import _pools

MODEL = "emulated"


def specs(urls: dict[str, str], *, model: str = MODEL) -> list[EngineSpec]:
    return [
        EngineSpec(
            engine_id=EngineId(name),
            url=url,
            role=Role.PREFILLER if name.startswith("p") else Role.DECODER,
            model=ModelName(model),
            transfer_group=TransferGroup("g"),
            kv_capacity_tokens=Tokens(10_000_000),
            max_hold_ms=Ms(30_000),
        )
        for name, url in urls.items()
    ]


def broker_for(urls: dict[str, str]) -> InMemoryBroker:
    return InMemoryBroker(specs(urls), settings=BrokerSettings(placement=PAPER))


@pytest.fixture(scope="module")
def fleet():
    with EmulatedFleet(
        default_fleet(prefillers=1, decoders=2, time_scale=0.0, tool_calls_min=1, kv_lease_ms=3_600_000)
    ) as running:
        yield running


@pytest.fixture
def before(fleet):
    """Make a `ConServe` object before the fleet."""
    with ExitStack() as stack:

        def make(**options) -> ConServe:
            for engine in fleet.engines:
                engine.clear_requests()
            broker = broker_for({engine.id: engine.url for engine in fleet.engines})
            turns = TurnCollector()
            connected = stack.enter_context(ConServe(broker.url, broker_transport=broker, on_turn=turns, **options))
            connected.turns = turns
            return connected

        yield make


@pytest.fixture
def conserve(before):
    return before()


def prompt(name: str) -> list[dict]:
    return [{"role": "user", "content": f"{name} " * 100 + f"Tell {name} about it."}]


def ask(client: openai.OpenAI, name: str, messages: list[dict]) -> str:
    with conversation(name):
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12)
    return answer.choices[0].message.content


# ---- bytes ----------------------------------------------------------------------------------------------------

ODD = EngineReply(
    content_type="text/event-stream; charset=utf-8",
    chunks=(
        b": hi\r\n\r\n",
        b"data: {not json\n",
        b"\ndata:{}\n\n\n",
        "data: é\n\n".encode(),
        b"data: [DONE]\n\n",
        b"\n",
    ),
    headers={"x-engine": "7", "x-conserve-mode": "forged"},
)


def test_the_bytes_of_an_answer_pass_untouched(make_world) -> None:
    world = make_world(engine=ScriptedEngine(then="answer").script("d0", ODD))
    body = {"model": "test-model", "messages": prompt("a"), "stream": True}

    def blocking():
        with world.conserve.http_client().stream("POST", "/chat/completions", json=body) as response:
            return response.headers, b"".join(response.iter_raw())

    async def looped():
        client = world.conserve.async_http_client()
        async with client.stream("POST", "/chat/completions", json=body) as response:
            return response.headers, b"".join([chunk async for chunk in response.aiter_raw()])

    headers, content = world.run(blocking, looped)
    assert content == b"".join(ODD.chunks)
    assert headers["x-engine"] == "7"
    assert headers["x-conserve-mode"] == "migrate"
    assert world.record.error == ""


def test_a_migrated_answer_equals_a_direct_one(fleet, conserve) -> None:
    messages = prompt("equal")
    direct = openai.OpenAI(base_url=f"{fleet.engine('d1').url}/v1", api_key="x")
    try:
        expected = ask(direct, "equal", messages)
        assert ask(conserve.openai_client(), "equal", messages) == expected
    finally:
        direct.close()
    (prefill,) = fleet.engine("p0").requests
    assert prefill.kv == "hold"
    decoded = [request for request in fleet.engine("d0").requests if request.external_tokens]
    assert [request.kv for request in decoded] == ["pull+hold"]
    assert conserve.turns.records[0].migrated


@pytest.mark.parametrize("route", ["/completions", "/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_other_routes_migrate_too(fleet, conserve, route, stream) -> None:
    text = f"{route} {stream} " * 200
    limit, field = ("max_output_tokens", "input") if route == "/responses" else ("max_tokens", "prompt")
    body = {"model": MODEL, field: text, limit: 8, "stream": stream}
    answer = conserve.http_client().post(route, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-conserve-prefiller"] == "p0"
    (record,) = conserve.turns.records
    assert (record.loss, record.migrated, record.finish_reason != "") == ("", True, True)


# ---- connections ----------------------------------------------------------------------------------------------


class CountingServer:
    """An engine that counts its connections and answers one streamed token, in chunked HTTP/1.1."""

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.open: set[int] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                outer.ports.append(self.client_address[1])
                outer.open.add(self.client_address[1])
                super().setup()

            def finish(self) -> None:
                super().finish()
                outer.open.discard(self.client_address[1])

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                reply = EngineReply.chat_stream("a") if body.get("stream") else EngineReply.chat()
                self.send_response(200)
                self.send_header("content-type", reply.content_type)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for chunk in reply.chunks:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server():
    running = CountingServer()
    yield running
    running.close()


@pytest.fixture
def counted(server, monkeypatch):
    # Only for requests that follow at once are connections kept: on a busy machine nothing follows at once.
    monkeypatch.setattr(_pools, "LIMITS", httpx2.Limits(keepalive_expiry=600.0))
    broker = broker_for({"d0": server.url})
    with ConServe(broker.url, broker_transport=broker) as connected:
        yield connected


def stream_once(conserve: ConServe, name: str = "s") -> None:
    with (
        conversation(name),
        conserve.openai_client().chat.completions.create(model=MODEL, messages=prompt(name), stream=True) as stream,
    ):
        assert [chunk.choices[0].delta.content for chunk in stream if chunk.choices][1] == "a"


def test_streams_use_one_connection_after_another(server, counted) -> None:
    for _ in range(5):
        stream_once(counted)
    assert len(server.ports) == 1


def test_async_streams_too(server, counted) -> None:
    async def go() -> None:
        client = counted.async_openai_client()
        for _ in range(5):
            with conversation("s"):
                stream = await client.chat.completions.create(model=MODEL, messages=prompt("s"), stream=True)
                assert [chunk async for chunk in stream]
        await counted.aclose()

    asyncio.run(go())
    assert len(server.ports) == 1


async def test_an_async_stream_left_at_its_end_marker_gives_its_connection_back(server, counted) -> None:
    body = {"model": MODEL, "messages": prompt("s"), "stream": True}
    for _ in range(3):
        async with counted.async_http_client().stream("POST", "/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    break
    assert len(server.ports) == 1
    await counted.aclose()


def test_one_client_in_three_event_loops(server, counted) -> None:
    client = counted.async_openai_client(max_retries=0)

    async def once() -> str:
        with conversation("loops"):
            answer = await client.chat.completions.create(model=MODEL, messages=prompt("loops"))
        return answer.choices[0].message.content

    assert [asyncio.run(once()) for _ in range(3)] == ["ok"] * 3
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: asyncio.run(once()), range(8))) == ["ok"] * 8
    assert len(server.ports) == 11
    deadline = time.monotonic() + 20
    while server.open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.open  # each loop took its connections along


def test_a_forked_child_opens_its_own_connections(server, counted, fork_and_wait) -> None:
    stream_once(counted)
    warm = list(server.ports)
    assert fork_and_wait(lambda: stream_once(counted)) == 0
    stream_once(counted)
    assert len(server.ports) == len(warm) + 1  # the child's; the parent went on with its own


def test_closing_a_copy_closes_nothing(counted) -> None:
    client = counted.openai_client()
    client.with_options(timeout=5).close()
    client.close()
    stream_once(counted)
    with counted.http_client() as http:
        assert http.post("/chat/completions", json={"model": MODEL, "messages": prompt("x")}).status_code == 200
    with conversation("x"):
        assert client.chat.completions.create(model=MODEL, messages=prompt("x"))


async def test_closing_an_async_copy_closes_nothing(counted) -> None:
    client = counted.async_openai_client()
    await client.with_options(timeout=5).close()
    with conversation("x"):
        assert await client.chat.completions.create(model=MODEL, messages=prompt("x"))
    await counted.aclose()
    await counted.aclose()


def test_a_transport_of_its_own(server) -> None:
    broker = broker_for({"d0": server.url})
    with httpx2.Client(
        transport=ConServeTransport(broker.url, broker_transport=broker), base_url="http://conserve.invalid/v1"
    ) as client:
        assert client.post("/chat/completions", json={"model": MODEL, "messages": prompt("x")}).status_code == 200


async def test_an_async_transport_of_its_own(server) -> None:
    broker = broker_for({"d0": server.url})
    transport = AsyncConServeTransport(broker.url, broker_transport=broker)
    async with httpx2.AsyncClient(transport=transport, base_url="http://conserve.invalid/v1") as client:
        answer = await client.post("/chat/completions", json={"model": MODEL, "messages": prompt("x")})
        assert answer.status_code == 200
    with pytest.raises(LeaseClosed):
        await transport.handle_async_request(httpx2.Request("GET", "http://conserve.invalid/v1/models"))


@pytest.mark.parametrize("kind", [ConServeTransport, AsyncConServeTransport, ConServe])
def test_copies_share_and_pickles_start_afresh(kind) -> None:
    original = kind("http://127.0.0.1:9", wait_s=3.0, on_turn=())
    assert copy.deepcopy({"it": original})["it"] is original
    again = pickle.loads(pickle.dumps(original))
    try:
        assert again._runtime is not original._runtime
        assert again._runtime.settings == original._runtime.settings
    finally:
        for transport in (original, again):
            transport._runtime.close()


def test_a_handle_that_shares_closes_nothing(counted) -> None:
    counted.transport().close()
    asyncio.run(counted.async_transport().aclose())
    stream_once(counted)
    assert not counted.closed


@pytest.mark.parametrize("fault", [AttributeError("no socket any more"), OSError(107, "not connected")])
async def test_a_peer_that_dies_as_it_is_connected_to(fault, monkeypatch) -> None:
    async def lost(_transport: object, _request: httpx2.Request) -> httpx2.Response:
        raise fault

    monkeypatch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", lost)
    pool = _pools.AsyncEnginePool()
    with pytest.raises(httpx2.ConnectError, match="lost as it was made"):
        await pool.handle_async_request(httpx2.Request("GET", "https://127.0.0.1:9"))
    await pool.aclose()


def test_https_engines_get_verified_connections() -> None:
    pool = ConServe("http://127.0.0.1:9")._runtime.engines
    tls, plain = pool._pool("https"), pool._pool("http")
    assert tls is not plain
    assert tls._pool._ssl_context.verify_mode.name == "CERT_REQUIRED"
    pool.close()


# ---- many at once ---------------------------------------------------------------------------------------------


AMPLE_S = 3_000.0


def talk(conserve: ConServe, number: int) -> list[str]:
    client = conserve.openai_client(max_retries=0, timeout=AMPLE_S)
    messages = prompt(f"conv{number}")
    answers = []
    for _ in range(3):
        answers.append(ask(client, f"conv{number}", messages))
        messages += [{"role": "assistant", "content": answers[-1]}, {"role": "user", "content": "And then?"}]
    return answers


async def atalk(conserve: ConServe, number: int) -> list[str]:
    client = conserve.async_openai_client(max_retries=0, timeout=AMPLE_S)
    messages = prompt(f"conv{number}")
    answers = []
    for _ in range(3):
        with conversation(f"conv{number}"):
            answer = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12)
        answers.append(answer.choices[0].message.content)
        messages += [{"role": "assistant", "content": answers[-1]}, {"role": "user", "content": "And then?"}]
    return answers


@pytest.mark.timeout(120)
def test_a_hundred_conversations_do_not_mix(fleet, before) -> None:
    # However busy the machine is, no prefill and no transfer meets a time limit.
    conserve = before(timeouts=Timeouts(broker_s=AMPLE_S, prefill_s=AMPLE_S, transfer_s=AMPLE_S))

    async def tasks() -> list[list[str]]:
        async with asyncio.TaskGroup() as group:
            started = [group.create_task(atalk(conserve, number)) for number in range(50)]
        return [task.result() for task in started]

    with ThreadPoolExecutor(9) as pool:
        looped = pool.submit(asyncio.run, tasks())
        threaded = list(pool.map(lambda number: talk(conserve, number), range(50, 100)))
    answers = looped.result() + threaded
    direct = openai.OpenAI(base_url=f"{fleet.engine('d1').url}/v1", api_key="x")
    try:
        for number in (0, 17, 49, 50, 83, 99):
            assert answers[number][0] == ask(direct, "reference", prompt(f"conv{number}"))
    finally:
        direct.close()
    records = conserve.turns.records
    assert len(records) == 300
    assert {record.error for record in records} == {""}
    assert {record.loss for record in records} == {""}
    assert sum(record.migrated for record in records) == len(fleet.engine("p0").requests) == 100
    assert len({(record.conversation_id, record.lineage) for record in records}) == 100
    per_conversation = {record.conversation_id: set() for record in records}
    for record in records:
        per_conversation[record.conversation_id].add(record.decoder_id)
    assert {len(decoders) for decoders in per_conversation.values()} == {1}


def test_nothing_but_the_given_transports_is_used() -> None:
    broker = InMemoryBroker()
    with (
        deny_network(),
        ConServe(broker.url, broker_transport=broker, engine_transport=ScriptedEngine(then="answer")) as c,
    ):
        c.openai_client().chat.completions.create(model="test-model", messages=prompt("x"))
        c.flush()


def test_cancelled_turns_leave_the_pool_and_the_leases_whole(server, counted, monkeypatch) -> None:
    monkeypatch.setattr(_pools, "LIMITS", httpx2.Limits(max_connections=5, keepalive_expiry=4.0))

    async def once(number: int) -> None:
        client = counted.async_openai_client(max_retries=0)
        with conversation(f"c{number % 7}"):
            stream = await client.chat.completions.create(model=MODEL, messages=prompt("c"), stream=True)
            assert [chunk async for chunk in stream]

    async def go() -> None:
        for number in range(150):
            task = asyncio.ensure_future(once(number))
            for _ in range(number % 50):  # a different await each time
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()  # and once more while it cleans up
            await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(once(number))
        await counted.aclose()

    asyncio.run(go())
    assert counted._runtime.kit.registry._flights == {}
    assert not counted._runtime.kit._running

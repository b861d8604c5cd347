"""An engine on a real socket that does what it is told: answer, refuse, hold still, break off; and counts all of it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from conserve_sdk.core.events import EngineSpec
from conserve_sdk.core.units import EngineId, ModelName, Ms, Tokens, TransferGroup
from conserve_sdk.core.vocabulary import Role
from conserve_sdk.testing import EngineReply

MODEL = "loopback"
PATIENCE_S = 60.0
"""How long a test waits for what must happen; far more than it takes, even on a busy machine."""


def eventually(holds, what: str = "") -> None:
    """Wait until a condition holds."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {PATIENCE_S:.0f} s: {what or holds}"
        time.sleep(0.005)


async def aeventually(holds, what: str = "") -> None:
    """The same inside an event loop."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {PATIENCE_S:.0f} s: {what or holds}"
        await asyncio.sleep(0.005)


@dataclass(slots=True)
class Received:
    """One request."""

    port: int
    path: str
    headers: dict[str, str]
    body: dict = field(default_factory=dict)

    @property
    def is_prefill(self) -> bool:
        return self.body.get("max_tokens") == 1 and "kv_transfer_params" in self.body


class LoopbackEngine:
    """One engine. What it does with a request:

    `answer`; `503`; `close` (the connection, without a word); `hold` (no byte until the client leaves);
    `hold_stream` (one token, then nothing until the client leaves); `burst` (a hundred tokens at once, then the same);
    `drop` (one token, then the connection breaks).

    Attributes:
        script: what to do with the next requests; `then` with all that follow.
        requests, ports: every request, every connection by its client's port.
        open: client ports of the connections that are open.
        waiting, aborted: requests that are held; requests whose client went away while (or before) they were.
    """

    def __init__(self, *script: str, then: str = "answer") -> None:
        self.script, self.then = deque(script), then
        self.requests: list[Received] = []
        self.ports: list[int] = []
        self.open: set[int] = set()
        self.waiting = self.aborted = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loopback-engine", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=512))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    async def _stop(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("peername")[1]
        self.ports.append(port)
        self.open.add(port)
        try:
            while (received := await _read(reader, port)) is not None:
                self.requests.append(received)
                if not await self._serve(received, reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open.discard(port)
            writer.close()

    async def _serve(self, received: Received, reader, writer) -> bool:
        """Do one request; False: the connection is of no more use."""
        what = self.script.popleft() if self.script else self.then
        match what:
            case "503":
                _write(writer, EngineReply.failure(503), {"retry-after-ms": "1"})
            case "close":
                return False
            case "hold":
                return await self._hold(reader, writer)
            case "hold_stream" | "burst":
                _begin(writer, tokens=100 if what == "burst" else 1)
                return await self._hold(reader, writer)
            case "drop":
                _begin(writer, tokens=1)
                await writer.drain()
                writer.transport.abort()
                return False
            case _:
                _write(writer, _answer(received))
        await writer.drain()
        return True

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        self.waiting += 1
        try:
            await writer.drain()
            gone = await reader.read(1) == b""
        except ConnectionError:
            gone = True
        self.waiting -= 1
        self.aborted += gone
        return False


def specs(*engines: tuple[str, LoopbackEngine]) -> list[EngineSpec]:
    """Engines as a broker's configuration knows them; `p..` are prefillers."""
    return [
        EngineSpec(
            engine_id=EngineId(name),
            url=engine.url,
            role=Role.PREFILLER if name.startswith("p") else Role.DECODER,
            model=ModelName(MODEL),
            transfer_group=TransferGroup("g"),
            kv_capacity_tokens=Tokens(10_000_000),
            block_size_tokens=Tokens(16),
            max_model_len_tokens=Tokens(1_000_000),
            max_hold_ms=Ms(30_000),
        )
        for name, engine in engines
    ]


async def _read(reader: asyncio.StreamReader, port: int) -> Received | None:
    with suppress(asyncio.IncompleteReadError):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = [line.split(":", 1) for line in lines[1:] if line]
        headers = {name.lower(): value.strip() for name, value in pairs}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        return Received(port, lines[0].split(" ")[1], headers, json.loads(content) if content else {})
    return None


def _answer(received: Received) -> EngineReply:
    if received.is_prefill:
        return EngineReply.prefill()
    if received.body.get("stream"):
        return EngineReply.chat_stream("o", "k")
    return EngineReply.chat(_echo(received.body))


def _echo(body: dict) -> str:
    """The name of the conversation, which tests put into its first word."""
    messages = body.get("messages") or [{"content": "ok"}]
    return str(messages[0]["content"]).split(" ")[0]


def _head(writer, reply: EngineReply, headers: dict[str, str]) -> None:
    fields = {"content-type": reply.content_type, "transfer-encoding": "chunked", **headers}
    lines = [f"HTTP/1.1 {reply.status} X", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    writer.write("\r\n".join(lines).encode())


def _write(writer, reply: EngineReply, headers: dict[str, str] | None = None) -> None:
    _head(writer, reply, headers or {})
    for chunk in reply.chunks:
        writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
    writer.write(b"0\r\n\r\n")


def _begin(writer, *, tokens: int) -> None:
    """The head and the first tokens of a stream."""
    reply = EngineReply.chat_stream(*["x"] * tokens, end=False)
    _head(writer, reply, {})
    for chunk in reply.chunks:
        writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

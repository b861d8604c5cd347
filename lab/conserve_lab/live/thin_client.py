"""A client that does next to nothing: it sends one completion and notes when each of its tokens arrives.

Parsing answers costs a Python client more than emulated engines take to make them; with hundreds of streams at once the
times measured would be its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_EVENT = b"data: {"
_END = b"data: [DONE]"


class StreamFailed(Exception):  # noqa: N818 -- says what happened
    """A stream was refused or cut."""


@dataclass(slots=True)
class TimedStream:
    """One stream's instants, in seconds of the monotonic clock.

    Attributes:
        tokens_s: one for each chunk. Chunks that arrive together have the same, and an engine may put tokens together.
    """

    sent_s: float = 0.0
    tokens_s: list[float] = field(default_factory=list)

    @property
    def ttft_us(self) -> int:
        """From sending to the first token."""
        return round((self.tokens_s[0] - self.sent_s) * 1_000_000)

    @property
    def duration_us(self) -> int:
        """From sending to the last token."""
        return round((self.tokens_s[-1] - self.sent_s) * 1_000_000)

    @property
    def mean_tbt_us(self) -> float:
        """Mean time between tokens."""
        gaps = max(len(self.tokens_s) - 1, 1)
        return (self.tokens_s[-1] - self.tokens_s[0]) * 1_000_000 / gaps


async def stream_tokens(url: str, *, model: str, prompt: list[int], output_tokens: int) -> TimedStream:
    """Send one completion of exactly so many tokens and read it to its end.

    Args:
        url: of the engine, without `/v1`.
        model: the model's name there.
        prompt: token ids.
        output_tokens: how many to generate.

    Raises:
        StreamFailed: the engine refused it or ended early.
        OSError: it cannot be reached.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,  # or vLLM leaves out the chunks of tokens that show no text
        "stream": True,
    }
    where = urlsplit(url)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[TimedStream] = loop.create_future()
    transport, _ = await loop.create_connection(
        lambda: _Reader(done, _request(where.netloc, body)), where.hostname or "", where.port or 80
    )
    try:
        return await done
    finally:
        transport.close()


def _request(host: str, body: Mapping[str, Any]) -> bytes:
    data = json.dumps(body, separators=(",", ":")).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data


class _Reader(asyncio.Protocol):
    """Counts events in what arrives."""

    def __init__(self, done: asyncio.Future[TimedStream], request: bytes) -> None:
        self._done = done
        self._request = request
        self._seen = TimedStream()
        self._tail = b""
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._seen.sent_s = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        if not self._head:
            self._head = data[:15]
            if b" 200" not in self._head:
                self._fail(data.decode(errors="replace")[:300])
        # A mark that two pieces share is found in the second: what is kept of the first cannot hold a whole one.
        piece = self._tail + data
        self._seen.tokens_s += [now_s] * piece.count(_EVENT)
        self._tail = piece[-(len(_EVENT) - 1) :]
        if _END in piece and not self._done.done():
            if self._seen.tokens_s:
                self._done.set_result(self._seen)
            else:
                self._fail("no token came")

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection ended early ({exc})")

    def _fail(self, why: str) -> None:
        if not self._done.done():
            self._done.set_exception(StreamFailed(why))

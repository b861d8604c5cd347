"""One request between the HTTP routes and the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from conserve_lab.emulator.driver import TokenStream
from conserve_lab.emulator.kv_params import KvWish
from conserve_lab.emulator.language import Answer, TokenIds, Wish

Route = Literal["chat", "completions", "responses"]
KvAnswer: TypeAlias = Callable[[], Mapping[str, Any] | None]
"""Gives the `kv_transfer_params` of an answer once it is finished."""


class Call(Protocol):
    """A request as one of the three APIs reads and shows it."""

    @property
    def generation(self) -> Generation:
        """What to generate."""

    def document(self, run: Run, kv_answer: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the whole answer."""

    def events(self, run: Run, kv_answer: KvAnswer) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a route asks of the engine."""

    request_id: str
    """The id the client sees; `X-Request-Id` shows in it."""
    route: Route
    prompt: TokenIds
    wish: Wish
    n: int = 1
    stream: bool = False
    kv: KvWish = field(default_factory=KvWish)
    cache_salt: str = ""
    session_id: str | None = None


@dataclass(slots=True, eq=False)
class Choice:
    """One of the `n` answers on its way."""

    index: int
    answer: Answer
    stream: TokenStream | None = None
    """None until it is submitted (siblings wait for the first token of choice 0)."""
    shown: int = 0
    """Tokens already handed to the client."""

    @property
    def finished(self) -> bool:
        """Whether the last token exists."""
        return self.stream is not None and self.stream.finished


@dataclass(frozen=True, slots=True)
class Update:
    """New tokens of one choice: those from `start` to before `end`."""

    choice: Choice
    start: int
    end: int
    last: bool


@dataclass(slots=True, eq=False)
class Run:
    """A request inside the engine."""

    generation: Generation
    internal_id: str
    """vLLM's own request id: the client's plus a random suffix."""
    choices: list[Choice]
    arrived_us: int
    block_size: int
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    pulled: bool = False
    held: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.generation.prompt)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, over all choices."""
        return sum(choice.stream.produced for choice in self.choices if choice.stream)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were in a cache: the prefiller's when the KV came from there, as vLLM reports it."""
        stream = self.choices[0].stream
        if stream is None or stream.sources is None:
            return 0
        pull = self.generation.kv.pull
        if pull is not None and stream.sources.external_kv_transfer and pull.prefill_cached_tokens is not None:
            return pull.prefill_cached_tokens
        return stream.sources.local_cache_hit

    @property
    def created_cache_tokens(self) -> int:
        """Prompt tokens in whole blocks that the engine computed itself (vLLM 0.32, `v1/metrics/stats.py`)."""
        stream = self.choices[0].stream
        if stream is None or stream.sources is None:
            return 0
        whole = self.prompt_tokens // self.block_size * self.block_size
        return max(whole - stream.sources.local_cache_hit - stream.sources.external_kv_transfer, 0)

    async def updates(self, *, interval: int = 1) -> AsyncIterator[list[Update]]:
        """Yield new tokens as they come to exist, several choices at a time.

        A slow reader gets as many updates as a fast one, so that what is streamed does not depend on timing.

        Args:
            interval: Tokens per update after a choice's first.

        Raises:
            ApiError: The engine failed the request.
        """
        while True:
            self.changed.clear()
            found = [update for choice in self.choices if (update := _update(choice, interval))]
            if found:
                yield found
            elif all(choice.finished for choice in self.choices):
                return
            else:
                await self.changed.wait()

    async def complete(self) -> None:
        """Wait until every choice is finished.

        Raises:
            ApiError: The engine failed the request.
        """
        while True:
            self.changed.clear()
            for choice in self.choices:
                if choice.stream is not None and choice.stream.error is not None:
                    raise choice.stream.error
            if all(choice.finished for choice in self.choices):
                return
            await self.changed.wait()


def _update(choice: Choice, interval: int) -> Update | None:
    stream = choice.stream
    if stream is None:
        return None
    if stream.error is not None:
        raise stream.error
    start = choice.shown
    end = start + (interval if start else 1)
    if end > stream.produced:
        if not stream.finished or start == stream.produced:
            return None
        end = stream.produced
    choice.shown = end
    return Update(choice, start, end, stream.finished and end == stream.produced)

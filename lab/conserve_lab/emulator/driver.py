"""The wall clock behind an engine model: one task that steps it and hands tokens to their requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from conserve_lab.emulator.errors import ApiError
from conserve_lab.engine_model import EngineModel, EngineRequest, FetchStart, Progress, PromptSources

_WAIT_MAX_S = 3600.0
_CATCH_UP_MAX_US = 100_000
"""How late a step may begin and still count as begun where the one before ended."""


@dataclass(slots=True, eq=False)
class TokenStream:
    """How far one sequence has come. The words are known beforehand; this says how many of them exist yet."""

    request: EngineRequest
    submitted_us: int
    changed: asyncio.Event
    """Shared by the sequences of one request, so that their reader waits in one place."""
    produced: int = 0
    finished: bool = False
    error: ApiError | None = None
    sources: PromptSources | None = None
    held_blocks: tuple[int, ...] = ()
    computed_tokens: int = 0
    last_token_us: int = 0


@dataclass(slots=True)
class DriverHooks:
    """Who hears about what the driver does."""

    on_fetch: Callable[[FetchStart], None]
    on_token: Callable[[TokenStream, int], None]
    """Called with the stream and the instant, before the stream changes."""
    on_finish: Callable[[TokenStream], None]
    """Called when the last token is handed on, and when a request is failed."""
    on_expired: Callable[[tuple[str, ...]], None]


@dataclass(slots=True, eq=False)
class Driver:
    """Steps an engine model in wall time.

    Args:
        model: The engine.
        clock_us: A monotonic clock in microseconds.
        hooks: Who hears about fetches, tokens, ends and expired holds.
    """

    model: EngineModel
    clock_us: Callable[[], int]
    hooks: DriverHooks
    _streams: dict[str, TokenStream] = field(default_factory=dict)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def submit(self, request: EngineRequest, *, changed: asyncio.Event) -> TokenStream:
        """Queue a request and return its stream.

        Raises:
            ValueError: The model refuses it.
        """
        self.model.submit(request)
        stream = TokenStream(request=request, submitted_us=self.clock_us(), changed=changed)
        self._streams[request.request_id] = stream
        self._wake.set()
        return stream

    def cancel(self, request_id: str) -> bool:
        """Abort a request whose end has not been handed on yet; False when there is none."""
        if self._streams.pop(request_id, None) is None:
            return False
        if not self.model.cancel(request_id):
            self.model.holds.release(request_id)  # finished in the step that is still being slept through
        self._wake.set()
        return True

    def fail(self, request_id: str, error: ApiError) -> None:
        """End a request with an error."""
        stream = self._streams.get(request_id)
        if stream is not None and self.cancel(request_id):
            stream.error = error
            stream.finished = True
            self.hooks.on_finish(stream)
            stream.changed.set()

    def fail_all(self, error: ApiError) -> None:
        """End every request with an error: the engine is broken."""
        for request_id in list(self._streams):
            self.fail(request_id, error)

    def wake(self) -> None:
        """Look at the model again: something about it changed from outside."""
        self._wake.set()

    async def run(self) -> None:
        """Step the model for ever; cancel the task to stop.

        A step that follows another begins where that one ended by the model, not where this loop was woken: else
        every step would be longer by what waking up and handing tokens on takes.
        """
        ended_us = 0
        while True:
            self._wake.clear()
            now_us = self.clock_us()
            start_us = ended_us if now_us - ended_us <= _CATCH_UP_MAX_US else now_us
            result = self.model.step(start_us)
            if result.expired:
                self.hooks.on_expired(result.expired)
            for fetch in result.fetches:
                self.hooks.on_fetch(fetch)
            if result.idle:
                ended_us = 0
                await self._sleep_until_woken()
                continue
            ended_us = start_us + result.duration_us if result.duration_us else 0
            await asyncio.sleep(max(0, start_us + result.duration_us - self.clock_us()) / 1e6)
            self._deliver(result.progress)

    async def _sleep_until_woken(self) -> None:
        """Wait for a request, a fetch, a cancellation, or the end of the next hold."""
        expiry_us = self.model.holds.next_expiry_us()
        timeout_s = _WAIT_MAX_S
        if expiry_us is not None:
            timeout_s = min(timeout_s, max(0.0, (expiry_us - self.clock_us()) / 1e6 + 0.001))
        try:
            async with asyncio.timeout(timeout_s):  # `wait_for` loses a cancellation that meets a wake-up (Python 3.11)
                await self._wake.wait()
        except TimeoutError:
            return  # the next step ends the hold

    def _deliver(self, progress: tuple[Progress, ...]) -> None:
        now_us = self.clock_us()
        for item in progress:
            stream = self._streams.get(item.request_id)
            if stream is None:
                continue  # cancelled while the step ran
            self.hooks.on_token(stream, now_us)
            stream.produced += 1
            stream.last_token_us = now_us
            if item.sources is not None:
                stream.sources = item.sources
            if item.finished:
                stream.finished = True
                stream.held_blocks = item.held_blocks
                stream.computed_tokens = item.computed_tokens
                del self._streams[item.request_id]
                self.hooks.on_finish(stream)
            stream.changed.set()

"""Server-sent events: one snapshot a second for everybody who listens, and no work when nobody does.

Every listener remembers only which snapshot it was given last, so one that reads slowly skips to the newest when it
comes back, and nothing queues up for it. Listening begins with the history and a whole snapshot: a client that lost its
connection needs nothing but a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterator

from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from conserve_broker.snapshot import HistoryInfo, Snapshot
from conserve_sdk._desk import ProblemRaised, problem

__all__ = ["EventStream", "Feed"]

RECONNECT_AFTER_MS = 1_000
FULL_RETRY_MS = 5_000
SEND_TIMEOUT_S = 60.0
"""A listener that takes nothing for this long has gone without saying so."""

_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class Feed:
    """Makes the events and keeps count of who listens. On one event loop.

    Args:
        snapshot: makes the newest snapshot.
        history: makes what came before.
        listeners_max: how many may listen at once.
        interval_s: between two snapshots.
        heartbeat_s: a comment is sent when there was nothing else for this long.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        history: Callable[[], HistoryInfo],
        *,
        listeners_max: int = 64,
        interval_s: float = 1.0,
        heartbeat_s: float = 15.0,
    ) -> None:
        self._snapshot = snapshot
        self._history = history
        self._listeners_max = listeners_max
        self._interval_s = interval_s
        self._heartbeat_s = heartbeat_s
        self._life = secrets.token_hex(4)  # so that no id of an earlier life is taken for one of this
        self._serial = 0
        self._latest = b""
        self._told: Snapshot | None = None
        self._news = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None
        self._closed = False
        self.listeners = 0

    @contextlib.contextmanager
    def seat(self) -> Iterator[None]:
        """Listen for as long as this lasts.

        Raises:
            ProblemRaised: too many listen already, or the broker is shutting down.
        """
        if self._closed:
            raise problem(
                503,
                code="shutting_down",
                title="Shutting down",
                detail="the broker is shutting down; try again in a moment",
                retry_after_ms=RECONNECT_AFTER_MS,
            )
        if self.listeners >= self._listeners_max:
            raise problem(
                503,
                code="too_many_listeners",
                title="Too many listeners",
                detail=f"{self._listeners_max} clients listen already; close some, or raise watch.event_listeners_max",
                retry_after_ms=FULL_RETRY_MS,
            )
        self.listeners += 1
        try:
            yield
        finally:
            self.listeners -= 1
            if not self.listeners and self._ticker is not None:
                self._ticker.cancel()
                self._ticker = None

    async def events(self, last_event_id: str = "") -> AsyncIterator[bytes]:
        """What one listener gets, until the feed is closed. Needs a `seat`.

        Args:
            last_event_id: of the last event it has from an earlier connection; that snapshot is not sent again.
        """
        if self._ticker is None or self._ticker.done():
            self._publish()
            self._ticker = asyncio.create_task(self._tick(), name="events")
        ticker = self._ticker
        yield b"retry: %d\n\n" % RECONNECT_AFTER_MS + _event("history", self._history())
        seen = self._serial if last_event_id == self._id() else -1
        while not self._closed:
            news = self._news
            if ticker.done():
                ticker.result()  # raises what broke it
            if self._serial != seen:
                seen = self._serial
                yield self._latest
                continue
            try:
                await asyncio.wait_for(news.wait(), self._heartbeat_s)
            except TimeoutError:
                yield b": nothing new\n\n"

    def close(self) -> None:
        """End all streams; nobody may listen any more."""
        self._closed = True
        self._wake()

    def _id(self) -> str:
        return f"{self._life}-{self._serial}"

    async def _tick(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._interval_s)
                self._publish()
        finally:
            self._wake()

    def _publish(self) -> None:
        snapshot = self._snapshot()
        told = self._told
        if (
            snapshot.role == "standby"
            and told is not None
            and snapshot.model_copy(update={"at_ms": told.at_ms}) == told
        ):
            return
        self._told = snapshot
        self._serial += 1
        self._latest = _event("snapshot", snapshot, event_id=self._id())
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _event(name: str, data: BaseModel, *, event_id: str = "") -> bytes:
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {name}\ndata: {data.model_dump_json()}\n\n".encode()


class EventStream(Response):
    """An answer that is a stream of events, or the problem that there is no seat left."""

    def __init__(self, feed: Feed, *, last_event_id: str) -> None:
        super().__init__()
        self._feed = feed
        self._last_event_id = last_event_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the client leaves, reads nothing for too long, or the feed is closed."""

        async def in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), SEND_TIMEOUT_S)

        try:
            with self._feed.seat():
                stream = StreamingResponse(
                    self._feed.events(self._last_event_id), media_type="text/event-stream", headers=_HEADERS
                )
                await stream(scope, receive, in_time)
        except ProblemRaised as full:
            reply = full.reply
            await Response(reply.content(), status_code=reply.status, headers=reply.headers)(scope, receive, send)

"""The guard's hands on ASGI messages: read a body, give it on, answer, and catch an answer."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from conserve_vllm.refusal import Refusal

__all__ = [
    "Caught",
    "ClientGone",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "header",
    "noting",
    "read_body",
    "replay",
    "respond",
    "with_body",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


class ClientGone(Exception):  # noqa: N818 -- says what happened
    """The client left before its request was complete."""


def header(scope: Scope, name: bytes) -> str | None:
    """A request header's value; None if it is absent.

    Raises:
        Refusal: it is there more than once, so that two readers might take two values.
    """
    values = [value for key, value in scope["headers"] if key.lower() == name]
    if len(values) > 1:
        raise Refusal(400, "repeated_header", f"the header {name.decode()} is there more than once")
    return values[0].decode("latin-1") if values else None


async def read_body(scope: Scope, receive: Receive, *, bytes_max: int) -> bytes:
    """The whole request body.

    Raises:
        Refusal: it is over the limit; it is then not read to its end.
        ClientGone: the client left.
    """
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdecimal() and int(declared) > bytes_max:
        raise _too_large(bytes_max)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > bytes_max:
            raise _too_large(bytes_max)
        if not message.get("more_body", False):
            return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once and then what the client does next."""
    waiting = [body]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again


def with_body(scope: Scope, body: bytes) -> Scope:
    """The scope of a request whose body is another now."""
    kept = [(key, value) for key, value in scope["headers"] if key.lower() not in _FRAMING]
    return {**scope, "headers": [*kept, (b"content-length", b"%d" % len(body))]}


def noting(send: Send, note: str) -> Send:
    """A `send` that adds what the guard did to the answer's headers."""

    async def noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), (b"x-conserve-guard", note.encode())]}
        await send(message)

    return noted


async def respond(send: Send, *, status: int, body: bytes) -> None:
    """Answer with JSON."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))] if body else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Caught:
    """A `send` that holds back a whole JSON answer, so that `edit` may change it; a stream passes as it comes.

    Args:
        send: where it goes in the end.
        edit: changes the parsed answer; returns whether it did.
        bytes_max: a longer answer passes unedited.
    """

    def __init__(self, send: Send, edit: Callable[[dict[str, Any]], bool], *, bytes_max: int) -> None:
        self._send = send
        self._edit = edit
        self._bytes_max = bytes_max
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self._size = 0

    async def __call__(self, message: Message) -> None:
        """Take one message of the answer."""
        if message["type"] == "http.response.start" and _is_json(message):
            self._start = message
        elif message["type"] != "http.response.body" or self._start is None:
            await self._send(message)
        else:
            await self._body(message, self._start)

    async def _body(self, message: Message, start: Message) -> None:
        self._parts.append(message.get("body", b""))
        self._size += len(self._parts[-1])
        more = bool(message.get("more_body", False))
        if more and self._size <= self._bytes_max:
            return
        body = b"".join(self._parts)
        self._start = None
        edited = body if more else self._edited(body)
        if edited is not body:
            start = {**start, "headers": with_body({"headers": start["headers"]}, edited)["headers"]}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": edited, "more_body": more})

    def _edited(self, body: bytes) -> bytes:
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            return body
        if not isinstance(answer, dict) or not self._edit(answer):
            return body
        return json.dumps(answer, separators=(",", ":")).encode("ascii")


_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


def _is_json(start: Message) -> bool:
    kinds = [value for key, value in start.get("headers", []) if key.lower() == b"content-type"]
    return start["status"] == 200 and bool(kinds) and kinds[0].startswith(b"application/json")


def _too_large(bytes_max: int) -> Refusal:
    return Refusal(413, "body_too_large", f"the body is over {bytes_max} bytes (CONSERVE_GUARD_BODY_BYTES_MAX)")

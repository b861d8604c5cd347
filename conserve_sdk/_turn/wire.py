"""Requests to engines: where they go and which headers they carry."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import httpx2

from conserve_sdk.identity import HEADER_SESSION
from conserve_sdk.protocol import Binding

__all__ = [
    "HEADER_LEASE",
    "SESSION_CHARS_MAX",
    "TRACE_HEADERS",
    "Target",
    "engine_request",
    "engine_target",
    "key_header",
    "read_headers",
]

HEADER_LEASE = "X-ConServe-Lease"
"""Carries the lease token to the engine, for a guard there; stock engines ignore it."""
SESSION_CHARS_MAX = 255
TRACE_HEADERS = ("traceparent", "tracestate")
"""W3C trace context, which vLLM reads; the application's own goes along unless a hook puts another in its place."""

_INTERNAL_PREFIX = b"x-conserve-"
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_REPLACED = frozenset(
    {
        HEADER_SESSION.lower().encode("ascii"),
        b"host",
        b"content-length",
        b"transfer-encoding",
        b"accept-encoding",  # the tracker reads the bytes that pass by, so they must come as they are
    }
)


def key_header(engine: Binding) -> list[tuple[bytes, bytes]]:
    """The engine's own API key, if the broker brought it; it takes the place of the application's."""
    return [(b"Authorization", f"Bearer {engine.api_key}".encode())] if engine.api_key else []


class Incoming(NamedTuple):
    """What an application's headers hold.

    Attributes:
        kept: the ones that go along to an engine: neither ConServe's own nor those that speak of the connection.
        trace: its trace context, by lower-case name.
    """

    kept: list[tuple[bytes, bytes]]
    trace: dict[str, str]


def read_headers(headers: httpx2.Headers) -> Incoming:
    """Look through the headers of a request, once."""
    raw = headers.raw
    kept, traced = _sorted_names(tuple([name for name, _ in raw]))
    return Incoming([raw[place] for place in kept], {name: headers[name] for name in traced})


@functools.lru_cache(maxsize=1_024)  # a client sends the same names with every request
def _sorted_names(names: tuple[bytes, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    lower = [name.lower() for name in names]
    kept = [
        place for place, name in enumerate(lower) if name not in _REPLACED and not name.startswith(_INTERNAL_PREFIX)
    ]
    return tuple(kept), tuple(name for name in TRACE_HEADERS if name.encode("ascii") in lower)


class Target(NamedTuple):
    """An engine's route, in the forms that a request needs."""

    url: httpx2.URL
    text: str
    host: bytes


@functools.lru_cache(maxsize=1_024)  # parsing a URL costs more than all else here, and there are few
def engine_target(base: str, path: str, *, query: bytes = b"") -> Target:
    """Where `path` is on an engine whose address is `base`, with or without a trailing `/v1`."""
    root = httpx2.URL(base)
    prefix = root.raw_path.split(b"?")[0].decode("ascii").rstrip("/")
    if path.startswith("/v1/"):
        prefix = prefix.removesuffix("/v1")
    target = f"{prefix}{path}".encode("ascii")
    url = root.copy_with(raw_path=target + (b"?" + query if query else b""))
    return Target(url, str(url), url.netloc)


def engine_request(
    original: httpx2.Request,
    *,
    target: Target,
    content: bytes,
    timeout: dict[str, float | None],
    kept: Sequence[tuple[bytes, bytes]],
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> httpx2.Request:
    """Build the request for an engine out of the application's.

    Its headers that are `kept` (`read_headers`) go along, and `headers` are set on top. They are put together here,
    because httpx2 looks through all of them for each one that it would add.
    """
    replaced = frozenset([name.lower() for name, _ in headers])
    sent = [(b"Host", target.host)]
    sent += [pair for pair in kept if pair[0].lower() not in replaced] if replaced else kept
    sent.append((b"Accept-Encoding", b"identity"))
    if content or original.method in _WITH_BODY:
        sent.append((b"Content-Length", b"%d" % len(content)))
    sent += headers
    request = httpx2.Request(
        original.method,
        target.url,
        headers=sent,
        stream=httpx2.ByteStream(content),
        extensions={**original.extensions, "timeout": timeout},
    )
    request.read()  # so that `content` may be asked for
    return request

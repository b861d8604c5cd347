"""Requests to engines: where they go and which headers they carry."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import httpx2

from conserve_sdk.identity import HEADER_SESSION

__all__ = [
    "HEADER_LEASE",
    "SESSION_CHARS_MAX",
    "TRACE_HEADERS",
    "Target",
    "engine_request",
    "engine_target",
    "trace_of",
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


def trace_of(headers: httpx2.Headers) -> dict[str, str]:
    """The application's own trace context, by lower-case name."""
    names = {name.lower() for name, _ in headers.raw}
    return {name: headers[name] for name in TRACE_HEADERS if name.encode("ascii") in names}


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
    headers: Mapping[str, str],
) -> httpx2.Request:
    """Build the request for an engine out of the application's.

    The application's headers go along, except those that speak of the connection and all that ConServe uses
    internally; `headers` are set on top. They are put together here, because httpx2 looks through all of them for each
    one that it would add.
    """
    replaced = _REPLACED.union(name.lower().encode("ascii") for name in headers)
    sent = [(b"Host", target.host)]
    sent += [
        pair
        for pair in original.headers.raw
        if (lower := pair[0].lower()) not in replaced and not lower.startswith(_INTERNAL_PREFIX)
    ]
    sent.append((b"Accept-Encoding", b"identity"))
    if content or original.method in _WITH_BODY:
        sent.append((b"Content-Length", b"%d" % len(content)))
    sent += [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
    request = httpx2.Request(
        original.method,
        target.url,
        headers=sent,
        stream=httpx2.ByteStream(content),
        extensions={**original.extensions, "timeout": timeout},
    )
    request.read()  # so that `content` may be asked for
    return request

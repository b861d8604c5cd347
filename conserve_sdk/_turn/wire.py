"""Requests to engines: where they go and which headers they carry."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import httpx2

from conserve_sdk.identity import HEADER_SESSION
from conserve_sdk.protocol import Binding

__all__ = ["HEADER_LEASE", "SESSION_CHARS_MAX", "TRACE_HEADERS", "engine_request", "engine_url", "key_header"]

HEADER_LEASE = "X-ConServe-Lease"
"""Carries the lease token to the engine, for a guard there; stock engines ignore it."""
SESSION_CHARS_MAX = 255
TRACE_HEADERS = ("traceparent", "tracestate")
"""W3C trace context, which vLLM reads; the application's own goes along unless a hook puts another in its place."""

_INTERNAL_PREFIX = b"x-conserve-"
_REPLACED = frozenset(
    {
        b"host",
        b"content-length",
        b"transfer-encoding",
        b"accept-encoding",  # the tracker reads the bytes that pass by, so they must come as they are
    }
)


def key_header(engine: Binding) -> dict[str, str]:
    """The engine's own API key, if the broker brought it; it takes the place of the application's."""
    return {"Authorization": f"Bearer {engine.api_key}"} if engine.api_key else {}


@functools.lru_cache(maxsize=1_024)  # parsing a URL costs more than all else here, and there are few
def engine_url(base: str, path: str, *, query: bytes = b"") -> httpx2.URL:
    """Where `path` is on an engine whose address is `base`, with or without a trailing `/v1`."""
    root = httpx2.URL(base)
    prefix = root.raw_path.split(b"?")[0].decode("ascii").rstrip("/")
    if path.startswith("/v1/"):
        prefix = prefix.removesuffix("/v1")
    target = f"{prefix}{path}".encode("ascii")
    return root.copy_with(raw_path=target + (b"?" + query if query else b""))


def engine_request(
    original: httpx2.Request,
    *,
    base: str,
    path: str,
    content: bytes,
    timeout: Mapping[str, float | None],
    headers: Mapping[str, str],
) -> httpx2.Request:
    """Build the request for an engine out of the application's.

    The application's headers go along, except those that speak of the connection and all that ConServe uses
    internally; `headers` are set on top.
    """
    replaced = _REPLACED | {name.lower().encode("ascii") for name in (HEADER_SESSION, *headers)}
    kept = [
        (name, value)
        for name, value in original.headers.raw
        if (lower := name.lower()) not in replaced and not lower.startswith(_INTERNAL_PREFIX)
    ]
    kept.append((b"Accept-Encoding", b"identity"))
    kept += [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
    extensions: dict[str, Any] = {**original.extensions, "timeout": dict(timeout)}
    return httpx2.Request(
        original.method,
        engine_url(base, path, query=original.url.query),
        headers=kept,
        content=content,
        extensions=extensions,
    )

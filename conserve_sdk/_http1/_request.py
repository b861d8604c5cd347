"""The bytes of a request."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import httpx2

__all__ = ["Limits", "Origin", "is_plain", "limits_of", "origin_of", "wire_form"]

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
"""RFC 9110, 5.6.2: what a header may be called."""
_BODILESS = frozenset({"HEAD", "CONNECT"})
"""Answers to these are framed by other rules."""


class Origin(NamedTuple):
    """Where a connection goes."""

    host: str
    port: int


class Limits(NamedTuple):
    """An httpx2 request's timeouts, in seconds; None: none."""

    connect_s: float | None
    read_s: float | None
    write_s: float | None
    pool_s: float | None


def is_plain(request: httpx2.Request) -> bool:
    """Whether a request may be sent from here."""
    return request.url.scheme == "http" and request.method not in _BODILESS


def origin_of(request: httpx2.Request) -> Origin:
    """Where a request goes."""
    return Origin(request.url.host, request.url.port or 80)


def limits_of(request: httpx2.Request) -> Limits:
    """How long its steps may take."""
    given = request.extensions.get("timeout") or {}
    return Limits(given.get("connect"), given.get("read"), given.get("write"), given.get("pool"))


def wire_form(request: httpx2.Request) -> bytes:
    """The whole request; its body must be in memory.

    Raises:
        httpx2.LocalProtocolError: a header cannot be sent as it is.
    """
    headers = request.headers.raw
    lines = [b"%s %s HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    lines += [name + b": " + value for name, value in headers]
    lines += (b"", b"")
    head = b"\r\n".join(lines)
    ends = len(lines) - 1
    # A line end inside of a value would begin a header, or a request, of somebody else's making.
    if head.count(b"\n") != ends or head.count(b"\r") != ends or b"\x00" in head:
        raise httpx2.LocalProtocolError("a header holds a line end or a zero byte", request=request)
    if not _are_tokens(tuple([name for name, _ in headers])):
        raise httpx2.LocalProtocolError("a header's name holds what a name cannot", request=request)
    return head + request.content


@functools.lru_cache(maxsize=1_024)  # the same names with every request
def _are_tokens(names: tuple[bytes, ...]) -> bool:
    return all(_TOKEN.fullmatch(name) for name in names)

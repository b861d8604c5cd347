"""One TLS context for all connections of the process: building one costs about 80 ms."""

from __future__ import annotations

import functools
import ssl
from collections.abc import Iterable

import httpx2

__all__ = ["verify_for"]


@functools.cache
def _shared_context() -> ssl.SSLContext:
    return httpx2.create_ssl_context()


def verify_for(urls: Iterable[str]) -> ssl.SSLContext | bool:
    """Return what to pass as `verify=` to an httpx2 transport that will talk to these URLs.

    The shared context if any of them is https. Where all are plain http there is nothing to verify, and False saves
    building a context that would never be used.
    """
    return _shared_context() if any(url.lower().startswith("https:") for url in urls) else False

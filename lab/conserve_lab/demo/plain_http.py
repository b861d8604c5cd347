"""HTTP clients for broker and engines on this machine.

They speak plain HTTP, so the clients are made without a TLS context: making one takes up to 0.4 s and holds the
interpreter meanwhile, which the agents would feel.
"""

from __future__ import annotations

import httpx2


def plain_client(timeout_s: float) -> httpx2.Client:
    """Return a blocking client for `http://` URLs, deaf to proxy settings of the environment."""
    return httpx2.Client(transport=httpx2.HTTPTransport(verify=False), timeout=timeout_s)


def plain_async_client(timeout_s: float) -> httpx2.AsyncClient:
    """Return the async twin of `plain_client`."""
    return httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(verify=False), timeout=timeout_s)

"""The HTTP clients that model objects share: one pair for each `ConServe` object, however many models use it."""

from __future__ import annotations

import threading
from typing import NamedTuple
from weakref import WeakKeyDictionary

import httpx2

from conserve_sdk import ConServe

_lock = threading.Lock()
_clients: WeakKeyDictionary[ConServe, Clients] = WeakKeyDictionary()


class Clients(NamedTuple):
    """What `ChatOpenAI` takes as `http_client` and `http_async_client`. They hold no connections of their own."""

    blocking: httpx2.Client
    nonblocking: httpx2.AsyncClient


def clients_of(conserve: ConServe) -> Clients:
    """Return the pair of a `ConServe` object."""
    with _lock:
        found = _clients.get(conserve)
        if found is None:
            found = _clients[conserve] = Clients(conserve.http_client(), conserve.async_http_client())
        return found

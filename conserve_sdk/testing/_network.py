"""A guard for tests that must not talk to anybody."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["NetworkDenied", "deny_network"]


class NetworkDenied(AssertionError):  # noqa: N818 -- says what happened
    """Something tried to connect."""


@contextmanager
def deny_network(*, allow_loopback: bool = False) -> Iterator[list[Any]]:
    """Inside the block, connecting an Internet socket raises `NetworkDenied` (an AssertionError) naming the address.

    Covers blocking code and asyncio's own event loops; not event loops that open sockets outside Python.

    Args:
        allow_loopback: let connections to this machine through.

    Yields:
        The addresses denied so far, for code under test that swallows errors (async clients
        over TLS raise this one inside an `ExceptionGroup`).
    """
    denied: list[Any] = []
    original = {name: socket.socket.__dict__.get(name) for name in ("connect", "connect_ex")}

    def guard(name: str) -> Any:
        real = getattr(socket.socket, name)

        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not (allow_loopback and _is_loopback(address[0])):
                denied.append(address)
                self.close()  # its owner is prepared for OSError only
                raise NetworkDenied(f"the network is denied here, but something connects to {address}")
            return real(self, address)

        return connect

    for name in original:
        setattr(socket.socket, name, guard(name))
    try:
        yield denied
    finally:
        for name, own in original.items():
            if own is None:
                delattr(socket.socket, name)
            else:
                setattr(socket.socket, name, own)


def _is_loopback(host: object) -> bool:
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return host == "localhost"

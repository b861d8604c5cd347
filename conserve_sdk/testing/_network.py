"""A guard for tests that must not talk to anybody."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["deny_network"]


@contextmanager
def deny_network(*, allow_loopback: bool = False) -> Iterator[None]:
    """Inside the block, every attempt to connect an Internet socket raises AssertionError naming the address.

    Covers blocking code and asyncio's own event loops; not event loops that open sockets outside Python.

    Args:
        allow_loopback: let connections to this machine through.
    """
    original = {name: socket.socket.__dict__.get(name) for name in ("connect", "connect_ex")}

    def guard(name: str) -> Any:
        real = getattr(socket.socket, name)

        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not (allow_loopback and _is_loopback(address[0])):
                self.close()  # its owner is prepared for OSError only
                raise AssertionError(f"the network is denied here, but something connects to {address}")
            return real(self, address)

        return connect

    for name in original:
        setattr(socket.socket, name, guard(name))
    try:
        yield
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

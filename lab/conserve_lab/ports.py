"""Ports for servers that must be told theirs beforehand, and must find it again after a restart."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Sequence

__all__ = ["NoPortError", "free_ports", "wait_free"]

# Below the kernel's ephemeral range: no outgoing connection can take the port of an engine that is being restarted.
FIRST, LAST = 20_000, 32_000
POLL_INTERVAL_S = 0.1

_searched = itertools.count()


class NoPortError(Exception):
    """There is no port, or the one that is needed is taken; the message says what to do."""


def free_ports(count: int) -> list[int]:
    """Find ports on 127.0.0.1 that nobody listens on.

    The search begins at a place that depends on our process, so that two fleets rarely meet, and goes on from there
    the next time: what was found may not be listened on yet.

    Args:
        count: How many.

    Returns:
        Different ports.

    Raises:
        NoPortError: There are not so many.
    """
    span = LAST - FIRST
    start = os.getpid() * 97 % span
    found: list[int] = []
    for _ in range(span):
        port = FIRST + (start + next(_searched)) % span
        if _is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise NoPortError(f"no {count} free ports between {FIRST} and {LAST}; stop some servers")


def wait_free(ports: Sequence[int], *, timeout_s: float) -> None:
    """Return once nobody listens on the ports: a killed engine's, or whoever took them while it was down.

    Raises:
        NoPortError: Somebody still does after this time.
    """
    deadline = time.monotonic() + timeout_s
    while taken := [port for port in ports if not _is_free(port)]:
        if time.monotonic() > deadline:
            raise NoPortError(f"port {taken[0]} is taken by another process; stop that, or start the fleet anew")
        time.sleep(POLL_INTERVAL_S)


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

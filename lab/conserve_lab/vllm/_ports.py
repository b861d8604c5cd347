"""Ports for servers that must be told theirs beforehand, and must find it again after a restart."""

from __future__ import annotations

import os
import socket

from conserve_lab.vllm.errors import VllmStartError

__all__ = ["free_ports"]

# Below the kernel's ephemeral range: no outgoing connection can take the port of an engine that is being restarted.
FIRST, LAST = 20_000, 32_000


def free_ports(count: int) -> list[int]:
    """Find ports on 127.0.0.1 that nobody listens on.

    The search begins at a place that depends on our process, so that two fleets rarely meet.

    Args:
        count: How many.

    Returns:
        Different ports.

    Raises:
        VllmStartError: There are not so many.
    """
    span = LAST - FIRST
    start = os.getpid() * 97 % span
    found: list[int] = []
    for step in range(span):
        port = FIRST + (start + step) % span
        if _is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise VllmStartError(f"no {count} free ports between {FIRST} and {LAST}; stop some servers")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

"""The clients that are compared: openai's own, openai's through the SDK, and openai's through a router."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import openai

from conserve_sdk import ConServe, conversation

__all__ = ["Arm", "bare_arm", "connections_made", "router_arm", "sdk_arm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to the engines.

    Attributes:
        inside: the context of one conversation's calls.
        options: further options of its calls.
        settle: ends what the arm still does in the background, so that it costs the arm and not the next one.
        other_cpu_s: CPU seconds of processes that serve this arm alone.
    """

    name: str
    client: openai.OpenAI
    inside: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext()
    options: Callable[[str], dict[str, Any]] = lambda _: {}
    settle: Callable[[], object] = lambda: None
    other_cpu_s: Callable[[], float] = lambda: 0.0


def bare_arm(decoder_url: str) -> Arm:
    """The client of openai itself, straight to the decoder."""
    return Arm(name="bare openai", client=openai.OpenAI(base_url=f"{decoder_url}/v1", api_key="EMPTY", max_retries=0))


def sdk_arm(conserve: ConServe) -> Arm:
    """The same client with its completions by lease."""
    return Arm(
        name="conserve_sdk",
        client=conserve.openai_client(max_retries=0),
        inside=conversation,
        settle=conserve.flush,
    )


def router_arm(url: str, *, cpu_s: Callable[[], float]) -> Arm:
    """The same client through vllm-router, with the header its sticky policy goes by."""
    return Arm(
        name="vllm-router",
        client=openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0),
        options=lambda name: {"extra_headers": {"X-Session-ID": name}},
        other_cpu_s=cpu_s,
    )


@contextmanager
def connections_made() -> Iterator[list[Any]]:
    """Collect the addresses that blocking code of this process connects to inside the block."""
    made: list[Any] = []
    real = socket.create_connection

    def noting(address: Any, *args: Any, **kwargs: Any) -> socket.socket:
        made.append(address)
        return real(address, *args, **kwargs)

    socket.create_connection = noting
    try:
        yield made
    finally:
        socket.create_connection = real

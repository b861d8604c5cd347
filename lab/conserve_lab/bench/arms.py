"""The clients that are compared: openai's, the SDK's, openai's over the SDK's transport, openai's through a router."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import openai

from conserve_sdk import BASE_URL, ConServe, conversation

__all__ = [
    "Arm",
    "async_arm",
    "async_over_transport",
    "async_straight",
    "bare_arm",
    "connections_made",
    "router_arm",
    "sdk_arm",
    "transport_arm",
]

Call = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to the engines.

    Attributes:
        create: `chat.completions.create`, blocking whatever the client's colour.
        count: runs through a streamed answer, closes it and returns how many chunks it had.
        close: closes the client.
        inside: the context of one conversation's calls.
        options: further options of its calls.
        settle: ends what the arm still does in the background, so that it costs the arm and not the next one.
        leave: ends a conversation, after it was measured: engines full of finished ones would take no new one.
        other_cpu_s: CPU seconds of processes that serve this arm alone.
        in_background: whether threads of this process work for it; arms of which that is true do the same work.
    """

    name: str
    create: Call
    count: Callable[[Any], int]
    close: Callable[[], object]
    inside: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext()
    options: Callable[[str], dict[str, Any]] = lambda _: {}
    settle: Callable[[], object] = lambda: None
    leave: Callable[[str], object] = lambda _: None
    other_cpu_s: Callable[[], float] = lambda: 0.0
    in_background: bool = False


def bare_arm(decoder_url: str) -> Arm:
    """The client of openai itself, straight to the decoder."""
    return _blocking("bare openai", openai.OpenAI(**_options(f"{decoder_url}/v1")))


def sdk_arm(conserve: ConServe) -> Arm:
    """The SDK's client."""
    return _by_lease(_blocking("conserve_sdk", conserve.openai_client(max_retries=0)), conserve)


def transport_arm(conserve: ConServe) -> Arm:
    """A client of openai itself over the SDK's transport: leases, and nothing else of ours."""
    client = openai.OpenAI(**_options(BASE_URL), http_client=conserve.http_client())
    return _by_lease(_blocking("transport", client), conserve)


def async_straight(url: str) -> openai.AsyncOpenAI:
    """The async client of `bare_arm` and `router_arm`."""
    return openai.AsyncOpenAI(**_options(f"{url}/v1"))


def async_over_transport(conserve: ConServe) -> openai.AsyncOpenAI:
    """The async client of `transport_arm`."""
    return openai.AsyncOpenAI(**_options(BASE_URL), http_client=conserve.async_http_client())


def _by_lease(arm: Arm, conserve: ConServe) -> Arm:
    return replace(
        arm,
        inside=conversation,
        settle=conserve.flush,
        leave=conserve.release,
        in_background=True,
    )


def router_arm(url: str, *, cpu_s: Callable[[], float]) -> Arm:
    """The same client through vllm-router, with the header its sticky policy goes by."""
    return replace(_blocking("vllm-router", openai.OpenAI(**_options(f"{url}/v1"))), options=_named, other_cpu_s=cpu_s)


def async_arm(arm: Arm, loop: asyncio.AbstractEventLoop, made: openai.AsyncOpenAI) -> Arm:
    """The async twin of an arm.

    Args:
        arm: the blocking one.
        loop: each call runs in it until it is answered.
        made: the client.
    """

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return loop.run_until_complete(loop.create_task(coroutine))

    async def count(answer: openai.AsyncStream[object]) -> int:
        async with answer:
            return sum([1 async for _ in answer])

    return replace(
        arm,
        name=f"{arm.name} async",
        create=lambda **options: run(made.chat.completions.create(**options)),
        count=lambda answer: run(count(answer)),
        close=lambda: run(made.close()),
    )


def _options(base_url: str) -> dict[str, Any]:
    return {"base_url": base_url, "api_key": "EMPTY", "max_retries": 0}


def _named(name: str) -> dict[str, Any]:
    return {"extra_headers": {"X-Session-ID": name}}


def _blocking(name: str, client: openai.OpenAI) -> Arm:
    def count(answer: openai.Stream[object]) -> int:
        with answer:
            return sum(1 for _ in answer)

    return Arm(name=name, create=client.chat.completions.create, count=count, close=client.close)


@contextmanager
def connections_made() -> Iterator[list[tuple[Any, int]]]:
    """Collect the addresses that this process connects an Internet socket to inside the block, with the threads."""
    made: list[tuple[Any, int]] = []
    if not _collecting:
        sys.addaudithook(_note)  # there is no way to take one back: made once, and deaf outside the block
    _collecting[:] = [made]
    try:
        yield made
    finally:
        _collecting[:] = [[]]


_collecting: list[list[tuple[Any, int]]] = []


def _note(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.connect" and args[0].family in (socket.AF_INET, socket.AF_INET6):
        _collecting[0].append((args[1], threading.get_ident()))

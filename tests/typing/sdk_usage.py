"""Only type-checked: what a program with strict types writes against the SDK's clients and conversations."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import assert_type

import httpx2
import openai

from conserve_sdk import (
    BASE_URL,
    HEADER_CONVERSATION,
    HEADER_LINEAGE,
    AsyncConServeTransport,
    ConServe,
    ConServeOptions,
    ConServeTransport,
    ConversationStats,
    Timeouts,
    async_openai_client,
    connect,
    conversation,
    current_conversation,
    make_lean,
    openai_client,
    wire_id,
)
from conserve_sdk.core.units import ConversationId


async def program() -> None:
    options: ConServeOptions = {"wait_s": 3.0, "timeouts": Timeouts(prefill_s=2.0), "fallback_engines": ["http://a"]}
    conserve = connect("http://127.0.0.1:7070", **options)
    assert_type(conserve, ConServe)
    assert_type(conserve.openai_client(max_retries=0), openai.OpenAI)
    assert_type(conserve.async_openai_client(), openai.AsyncOpenAI)
    assert_type(make_lean(openai.OpenAI()), openai.OpenAI)
    assert_type(make_lean(openai.AsyncOpenAI()), openai.AsyncOpenAI)
    assert_type(openai_client(), openai.OpenAI)
    assert_type(async_openai_client(["http://a", "http://b"], max_retries=0), openai.AsyncOpenAI)
    assert_type(conserve.http_client(), httpx2.Client)
    assert_type(conserve.async_http_client(), httpx2.AsyncClient)
    assert_type(conserve.transport(), ConServeTransport)
    assert_type(conserve.async_transport(), AsyncConServeTransport)
    httpx2.Client(transport=ConServeTransport(["http://a", "http://b"], on_broker_unavailable="raise"))
    httpx2.AsyncClient(
        transport=AsyncConServeTransport(fallback_engines=["http://a"], stranger_bytes_max=0, slice_chars=32_768)
    )
    openai.OpenAI(base_url=BASE_URL, default_headers={HEADER_CONVERSATION: "c", HEADER_LINEAGE: "planner"})


async def life(conserve: ConServe) -> None:
    assert_type(conserve.release("c"), int)
    assert_type(await conserve.arelease("c"), int)
    assert_type(conserve.park("c"), int)
    assert_type(await conserve.apark("c"), int)
    assert_type(conserve.idle("c"), int)
    assert_type(conserve.flush(timeout_s=1.0), bool)
    assert_type(conserve.stats("c"), ConversationStats)
    assert_type((conserve.closed, conserve.reports_dropped), tuple[bool, int])
    conserve.close(release=True)
    await conserve.aclose(release=True)
    async with conserve as same:
        assert_type(same, ConServe)


async def conversations() -> None:
    with conversation("c", lineage="planner"):
        assert_type(current_conversation(), ConversationId | None)
    async with conversation("c") as block:
        assert_type(block.stats(), ConversationStats)
    assert_type(wire_id("Ticket 17"), ConversationId)
    assert_type(conversation("c").wrap(len)("abc"), int)

    @conversation("c").wrap
    async def ask(question: str) -> int:
        return len(question)

    @conversation("c").wrap
    def tokens(count: int) -> Iterator[str]:
        yield "a" * count

    @conversation("c").wrap
    async def later(count: int) -> AsyncIterator[str]:
        yield "a" * count

    assert_type(await ask("hello"), int)
    assert_type(list(tokens(3)), list[str])
    assert_type([token async for token in later(3)], list[str])
    await ask(3)  # type: ignore[arg-type]


async def clients_wrong(conserve: ConServe) -> None:
    connect("http://a", on_broker_unavailable="panic")  # type: ignore[arg-type]
    connect("http://a", tiemout=3)  # type: ignore[call-arg]
    ConServe(3)  # type: ignore[arg-type]
    options: ConServeOptions = {"wait_s": "3"}  # type: ignore[typeddict-item]
    Timeouts(3.0)  # type: ignore[call-arg]
    Timeouts(prefil_s=2.0)  # type: ignore[call-arg]
    ConServeTransport(wait_s=None)  # type: ignore[arg-type]
    AsyncConServeTransport(fallback_engines=[3], **options)  # type: ignore[list-item, misc]
    httpx2.Client(transport=AsyncConServeTransport())  # type: ignore[arg-type]
    openai_client(3)  # type: ignore[arg-type]
    async_openai_client({"a": 1}.items())  # type: ignore[arg-type]
    make_lean(openai)  # type: ignore[type-var]
    await conserve.release("c")  # type: ignore[misc]
    conserve.park()  # type: ignore[call-arg]
    conserve.apark("c") + 1  # type: ignore[operator]
    conserve.close(True)  # type: ignore[call-arg]
    conversation()  # type: ignore[call-arg]
    conversation("c", "planner")  # type: ignore[call-arg]
    conversation("c").wrap("ask")  # type: ignore[arg-type]
    current_conversation("c")  # type: ignore[call-arg]
    wire_id(3)  # type: ignore[arg-type]

"""Only type-checked: what a program with strict types writes against the SDK."""

from __future__ import annotations

from typing import assert_type

import httpx2
import openai

import conserve_sdk
from conserve_sdk import (
    AsyncConServeTransport,
    ConServe,
    ConServeTransport,
    ConversationStats,
    LeaseRefused,
    LoggingHook,
    OpenTelemetryHook,
    PrometheusHook,
    Timeouts,
    TurnHook,
    TurnRecord,
    connect,
    conversation,
    last_turn,
)
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine, deny_network


def hook(record: TurnRecord) -> None:
    assert_type(record.ttft_ms, int | None)


async def program() -> None:
    as_hook: TurnHook = hook
    conserve = connect("http://127.0.0.1:7070", wait_s=3.0, on_turn=as_hook, timeouts=Timeouts(prefill_s=2.0))
    assert_type(conserve, ConServe)
    assert_type(conserve.openai_client(max_retries=0), openai.OpenAI)
    assert_type(conserve.async_openai_client(), openai.AsyncOpenAI)
    assert_type(conserve_sdk.openai_client(), openai.OpenAI)
    assert_type(conserve.http_client(), httpx2.Client)
    assert_type(conserve.async_http_client(), httpx2.AsyncClient)
    assert_type(conserve.transport(), ConServeTransport)
    assert_type(conserve.async_transport(), AsyncConServeTransport)
    assert_type(conserve.release("c"), int)
    assert_type(await conserve.apark("c"), int)
    assert_type(conserve.idle("c"), int)
    assert_type(conversation("c").wrap(len)("abc"), int)
    httpx2.Client(transport=ConServeTransport(["http://a", "http://b"], on_broker_unavailable="raise"))
    httpx2.AsyncClient(transport=AsyncConServeTransport(fallback_engines=["http://a"], on_turn=[hook]))
    with conversation("c", lineage="planner"):
        pass
    async with conversation("c") as block:
        assert_type(block.stats(), ConversationStats)
    assert_type(conserve.stats("c").last, TurnRecord | None)
    assert_type(last_turn(), TurnRecord | None)
    connect("http://a", on_turn=[LoggingHook(), OpenTelemetryHook(), PrometheusHook()])
    try:
        conserve.close(release=True)
    except LeaseRefused as refused:
        assert_type(refused.retry_after_ms, int)


def wrong() -> None:
    connect("http://a", on_broker_unavailable="panic")  # type: ignore[arg-type]
    connect("http://a", tiemout=3)  # type: ignore[call-arg]
    ConServe(3)  # type: ignore[arg-type]


def in_tests() -> None:
    broker = InMemoryBroker()
    engine = ScriptedEngine(EngineReply.chat("hi"), then="answer").script("d0", EngineReply.unreachable())
    with deny_network(), ConServe(broker.url, broker_transport=broker, engine_transport=engine) as conserve:
        conserve.flush()

"""One time budget over broker, prefill and decode: what a slow broker takes, the engines do not get on top."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx2
import openai
import pytest

from conserve_sdk import BrokerError, ConServe, Timeouts, TurnCollector, conversation
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import InMemoryBroker, ScriptedEngine

TOTAL_S = 20.0
SLOW_S = 0.4
SHORT_S = 0.6
FAR_TOO_LONG_S = 60.0
LONG = [{"role": "user", "content": "hello " * 400}]
COLOURS = pytest.mark.parametrize("colour", ["sync", "async"])
SILENCES = pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{"])


class SlowBroker(InMemoryBroker):
    """Takes its time for a lease."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/v1/leases":
            time.sleep(SLOW_S)
        return super().handle_request(request)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/v1/leases":
            await asyncio.sleep(SLOW_S)
        return await super().handle_async_request(request)


@contextlib.contextmanager
def stuck_broker(says: bytes) -> Iterator[str]:
    """Takes every connection and never ends an answer: silent after its first bytes, or dripping blanks."""
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(says)
            while not over.wait(0.02):
                if says:
                    connection.sendall(b" ")

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                talk = threading.Thread(target=drip, args=(server.accept()[0],))
                talk.start()
                talking.append(talk)

    talking: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        accepting = threading.Thread(target=serve)
        accepting.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            over.set()
            server.shutdown(socket.SHUT_RDWR)
    for thread in (accepting, *talking):
        thread.join()


def ask(conserve: ConServe, colour: str, timeout_s: float) -> tuple[object, float]:
    """One turn: its text or its error, and how long it took in seconds."""
    started_s = time.monotonic()
    options = {"model": "test-model", "messages": LONG, "timeout": timeout_s}
    try:
        with conversation("c"):
            if colour == "sync":
                answer = conserve.openai_client(max_retries=0).chat.completions.create(**options)
            else:
                answer = asyncio.run(conserve.async_openai_client(max_retries=0).chat.completions.create(**options))
    except openai.OpenAIError as error:
        return error, time.monotonic() - started_s
    return answer.choices[0].message.content, time.monotonic() - started_s


@COLOURS
def test_a_slow_broker_leaves_the_engines_what_is_left(colour: str) -> None:
    broker, engine, turns = SlowBroker(settings=BrokerSettings(placement=PAPER)), ScriptedEngine(then="answer"), []
    with ConServe(broker.url, broker_transport=broker, engine_transport=engine, on_turn=turns.append) as conserve:
        assert ask(conserve, colour, TOTAL_S)[0] == "ok"
    prefill, decode = engine.calls
    left_s = TOTAL_S - SLOW_S
    assert 0 < prefill.timeout["read"] <= left_s / 2  # the prefill may use half of it
    assert 0 < decode.timeout["read"] <= left_s
    assert all(limit_s <= left_s for call in engine.calls for limit_s in call.timeout.values())
    assert turns[0].lease_wait_ms >= SLOW_S * 1000 - 1


@COLOURS
@SILENCES
def test_a_broker_that_never_answers_is_given_up_within_the_turns_time(colour: str, says: bytes) -> None:
    engine = ScriptedEngine(then="answer")
    patient = Timeouts(broker_s=FAR_TOO_LONG_S)
    with (
        stuck_broker(says) as url,
        ConServe(url, engine_transport=engine, timeouts=patient, wait_s=FAR_TOO_LONG_S, on_turn=()) as conserve,
    ):
        outcome, took_s = ask(conserve, colour, SHORT_S)
    assert isinstance(outcome, BrokerError | openai.APITimeoutError)
    assert took_s < FAR_TOO_LONG_S / 2
    assert engine.calls == []


@COLOURS
@SILENCES
def test_what_a_broker_that_never_answers_took_is_gone_for_the_fallback(colour: str, says: bytes) -> None:
    engine, turns = ScriptedEngine(then="answer"), TurnCollector()
    with (
        stuck_broker(says) as url,
        ConServe(
            url,
            engine_transport=engine,
            timeouts=Timeouts(broker_s=SLOW_S),
            wait_s=0,
            fallback_engines=["http://d0.invalid"],
            on_turn=turns,
        ) as conserve,
    ):
        assert ask(conserve, colour, TOTAL_S)[0] == "ok"
    (call,) = engine.calls
    assert 0 < call.timeout["read"] <= TOTAL_S - SLOW_S
    assert turns.records[0].loss == "broker_unavailable"

"""Who repeats what, counted at the engine: openai its turns, ConServe one failover, nobody anything else.

The engines answer with `retry-after-ms: 1`, so openai's pauses cost no time.
"""

from __future__ import annotations

import asyncio
import socket

import openai
import pytest

from conserve_sdk import ConServeError, conversation
from tests.support.loopback import MODEL, LoopbackEngine, eventually

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """openai's pauses between retries are its own affair; here only their number matters."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


@pytest.fixture(params=["sync", "async"])
def ask(request):
    """Ask once in either colour; the error, or None."""

    def run(conserve, *, stream: bool = False, **options):
        async def looped() -> None:
            client = conserve.async_openai_client(**options)
            answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
            if stream:
                async for _ in answer:
                    pass

        def blocking() -> None:
            answer = conserve.openai_client(**options).chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=stream
            )
            if stream:
                list(answer)

        seen: BaseException | None = None
        try:
            with conversation("c1"):
                blocking() if request.param == "sync" else asyncio.run(looped())
        except BaseException as error:
            seen = error
        # Nothing of httpx2, asyncio or the SDK's inside reaches the application.
        assert seen is None or isinstance(seen, ConServeError) or type(seen).__module__.startswith("openai"), repr(seen)
        assert isinstance(seen, openai.OpenAIError | None)
        return seen

    return run


def hits(*servers: LoopbackEngine) -> list[int]:
    return [len(server.requests) for server in servers]


@pytest.mark.parametrize("stream", [False, True])
def test_503_everywhere_without_retries(engine, front, ask, stream) -> None:
    """One turn: each decoder is asked once, the second because of the one failover."""
    one, two = engine(then="503"), engine(then="503")
    error = ask(front(d0=one, d1=two), max_retries=0, stream=stream)
    assert isinstance(error, openai.InternalServerError)
    assert error.status_code == 503
    assert hits(one, two) == [1, 1]


def test_503_from_the_only_decoder(engine, front, ask) -> None:
    """Nothing else is free, and this turn does not wait for it."""
    only = engine(then="503")
    assert ask(front({"wait_s": 0.0}, d0=only), max_retries=0).status_code == 503
    assert hits(only) == [1]


def test_503_once_is_not_seen(engine, front, ask) -> None:
    one, two = engine("503"), engine("503")
    conserve = front(d0=one, d1=two)
    two.script.clear()
    assert ask(conserve, max_retries=0) is None
    assert hits(one, two) == [1, 1]


@pytest.mark.parametrize("retries", [0, 2])
def test_refused_connections(front, engine, ask, retries) -> None:
    """Nobody listens: one failover a turn, and as many turns as openai was told to make, no product of the two."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    dead = engine()
    dead.url = f"http://127.0.0.1:{port}"
    conserve = front({"wait_s": 0.0}, d0=dead)
    error = ask(conserve, max_retries=retries)
    assert isinstance(error, openai.APIConnectionError | ConServeError)
    assert len(conserve.turns.records) <= 1 + retries
    assert conserve.turns.records[0].hops == 1
    assert hits(dead) == [0]


@pytest.mark.parametrize("retries", [0, 1])
def test_a_read_timeout(engine, front, ask, at_rest, retries) -> None:
    """Each turn asks once and keeps its lease: the engine may be busy and well."""
    silent, other = engine(then="hold"), engine(then="hold")
    conserve = front(d0=silent, d1=other)
    assert isinstance(ask(conserve, max_retries=retries, timeout=0.5), openai.APITimeoutError)
    eventually(lambda: silent.aborted + other.aborted == 1 + retries)
    assert sorted(hits(silent, other)) == [0, 1 + retries]
    assert [record.failovers for record in conserve.turns.records] == [0] * (1 + retries)
    assert conserve.broker.core.lease_count() == 1
    at_rest(conserve)


@pytest.mark.parametrize("retries", [0, 2])
def test_a_drop_in_mid_stream_is_never_repeated(engine, front, ask, retries) -> None:
    one, two = engine(then="drop"), engine(then="drop")
    error = ask(front(d0=one, d1=two), max_retries=retries, stream=True)
    assert isinstance(error, openai.APIConnectionError)
    assert sorted(hits(one, two)) == [0, 1]


def test_a_connection_that_closes_without_a_word(engine, front, ask) -> None:
    """It may have been an idle one that just closed: asked once more, then the other decoder, twice as well."""
    one, two = engine(then="close"), engine(then="close")
    assert isinstance(ask(front(d0=one, d1=two), max_retries=0), openai.APIConnectionError)
    assert hits(one, two) == [2, 2]


def test_a_broker_that_is_away_is_no_reason_for_openai_to_retry(engine, front, ask) -> None:
    server = engine()
    conserve = front(d0=server)
    conserve.broker.stop()
    error = ask(conserve, max_retries=5)
    assert isinstance(error, ConServeError)
    assert len(conserve.turns.records) == 1
    assert hits(server) == [0]


def test_a_request_the_engine_refuses_is_asked_once(engine, front, ask) -> None:
    server = engine()
    conserve = front(d0=server)
    with pytest.raises(openai.BadRequestError), conversation("c1"):
        conserve.openai_client(max_retries=5).chat.completions.create(model="no such model", messages=MESSAGES)
    assert hits(server) == [0]
    assert not conserve.turns.records

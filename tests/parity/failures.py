"""Scenes in which something fails: engines, transfers, brokers, the application's own request."""

from __future__ import annotations

import httpx2

from conserve_sdk import conversation
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine, small_fleet
from tests.parity.program import Program
from tests.parity.scenes import scene
from tests.support.dialogue import follow_up
from tests.support.patience import be_patient, hurry

FALLBACK = {"fallback_engines": ["http://f0.invalid", "http://f1.invalid"], "wait_s": 0}


def engines(**scripts: list[EngineReply]):
    """Engines that play these replies, then answer like vLLM."""

    def make() -> dict:
        engine = ScriptedEngine(then="answer")
        for name, replies in scripts.items():
            engine.script(name, *replies)
        return {"engine": engine}

    return make


def one_decoder() -> dict:
    broker = InMemoryBroker(small_fleet(decoders=1), settings=BrokerSettings(placement=PAPER))
    return {"broker": broker, "wait_s": 0}


# ---- engines --------------------------------------------------------------------------------------------------

_WAYS_TO_LOSE_A_PREFILL = {
    "unreachable": EngineReply.unreachable(),
    "broken": EngineReply.broken(),
    "silent": EngineReply.silent(),
    "failing": EngineReply.failure(503),
    "without_params": EngineReply.prefill(params=None),
    "with_bad_params": EngineReply.prefill(params={"do_remote_prefill": True}),
}


def _lose_a_prefill(way: str, reply: EngineReply) -> None:
    async def play(p: Program) -> None:
        await p.ask(0)
        await p.ask(1, stream=True)
        assert p.engines_called == ["p0", "d0", "d0"]
        assert p.turns.records[0].loss
        assert p.errors == ["", ""]

    play.__name__ = f"a_prefill_{way}"
    scene(engines(p0=[reply]))(play)


for _way, _reply in _WAYS_TO_LOSE_A_PREFILL.items():
    _lose_a_prefill(_way, _reply)


@scene(engines(d0=[EngineReply.failure(500)]))
async def a_transfer_that_fails(p: Program) -> None:
    await p.ask(0)
    assert p.engines_called == ["p0", "d0", "d0"]
    assert p.turns.records[0].loss == "transfer_failed"


@scene(engines(d0=[EngineReply.stream_error()]))
async def a_streamed_transfer_that_fails(p: Program) -> None:
    await p.ask(0, stream=True)
    assert p.engines_called == ["p0", "d0", "d0"]


@scene()
async def a_decoder_that_is_gone_between_two_turns(p: Program) -> None:
    await p.ask(0)
    p.engine.script("d0", EngineReply.unreachable())
    await p.ask(1, stream=True)
    await p.ask(2)
    assert p.engines_called == ["p0", "d0", "d0", "p0", "d1", "d1"]
    assert [record.epoch for record in p.turns.records] == [1, 2, 2]


@scene()
async def an_idle_connection_that_closed(p: Program) -> None:
    await p.ask(0)
    p.engine.script("d0", EngineReply.broken())
    await p.ask(1)
    assert p.engines_called == ["p0", "d0", "d0", "d0"]


@scene(engines(d0=[EngineReply.unreachable()], d1=[EngineReply.unreachable()]))
async def two_decoders_that_are_gone(p: Program) -> None:
    error = await p.ask(0)
    assert type(error).__name__ == "APIConnectionError"
    assert p.engines_called == ["p0", "d0", "p0", "d1"]


@scene(engines(d0=[EngineReply.failure(503)], d1=[EngineReply.failure(503, "queue is full")]))
async def two_decoders_that_are_full(p: Program) -> None:
    assert type(await p.ask(0)).__name__ == "InternalServerError"


@scene(lambda: {**one_decoder(), **engines(d0=[EngineReply.unreachable()])()})
async def the_only_decoder_is_gone(p: Program) -> None:
    assert type(await p.ask(0)).__name__ == "APIConnectionError"
    assert p.errors == ["unreachable"]


@scene(engines(d0=[EngineReply.failure(400, "too long"), EngineReply.failure(400, "too long")]))
async def a_prompt_that_is_too_long(p: Program) -> None:
    assert "too long" in str(await p.ask(0))
    assert p.errors == ["http_400"]


def _refused(status: int) -> None:
    async def play(p: Program) -> None:
        assert (await p.ask(0)).status_code == status
        assert (await p.ask(0, stream=True)).status_code == status
        assert p.engines_called == ["p0", "d0", "d0"]

    play.__name__ = f"a_request_refused_with_{status}"
    scene(engines(d0=[EngineReply.failure(status), EngineReply.failure(status)]))(play)


for _status in (401, 403, 429):
    _refused(_status)


@scene(engines(d0=[EngineReply.failure(429), EngineReply.failure(429)]))
async def retries_of_the_client(p: Program) -> None:
    p.engine.script("d0", EngineReply.chat("at last"))
    answer = await p.ask(0, extra_headers={}, timeout=60.0)
    assert answer.status_code == 429
    with conversation("c1"):
        client = p.client.with_options(max_retries=1)
        await p.call("chat.completions.create", client=client, messages=follow_up(0))
    assert p.errors == ["http_429", "http_429", ""]


@scene(engines(d0=[EngineReply.silent()]))
async def a_decoder_that_says_nothing(p: Program) -> None:
    assert type(await p.ask(0)).__name__ == "APITimeoutError"
    await p.ask(0)
    assert p.errors == ["timeout", ""]
    assert p.engines_called == ["p0", "d0", "d0"]


@scene(engines(p0=[EngineReply.prefill().taking(12_000)]))
async def a_budget_that_is_spent(p: Program) -> None:
    error = await p.ask(0, timeout=10.0)
    assert type(error).__name__ == "APITimeoutError"
    assert p.engines_called == ["p0"]


@scene(engines(d0=[EngineReply.chat().taking(2_000), EngineReply.chat_stream("a", "b").taking(1_000, between_ms=30)]))
async def time_that_passes(p: Program) -> None:
    await p.ask(0, timeout=httpx2.Timeout(10.0, connect=2.0))
    await p.ask(1, stream=True)
    assert [call.timeout["read"] for call in p.engine.calls] == [5.0, 10.0, 600.0]
    assert [record.ttft_ms for record in p.turns.records] == [2_000, 1_030]
    assert p.turns.records[1].tbt_us == (30_000,)


@scene()
async def a_stream_that_drops(p: Program) -> None:
    await p.ask(0)
    p.engine.script("d0", EngineReply.chat_stream("a", "b", end=False).dropped())
    assert type(await p.ask(1, stream=True)).__name__ == "APIConnectionError"
    assert p.errors == ["", "stream_dropped"]
    assert p.engines_called == ["p0", "d0", "d0"]


@scene()
async def an_error_inside_a_stream(p: Program) -> None:
    await p.ask(0)
    begun = EngineReply.chat_stream("a", end=False)
    rest = EngineReply.stream_error(message="boom").chunks
    p.engine.script("d0", EngineReply(content_type=begun.content_type, chunks=(*begun.chunks, *rest)))
    assert "boom" in str(await p.ask(1, stream=True))
    assert p.errors == ["", "engine_error"]


@scene()
async def a_stream_that_is_left(p: Program) -> None:
    async def first(stream) -> object:
        items = aiter(stream) if hasattr(stream, "__aiter__") else iter(stream)
        item = await anext(items) if hasattr(items, "__anext__") else next(items)
        await p.value(stream.close())
        return item

    async def begin() -> object:
        fields = {"model": "test-model", "messages": follow_up(0), "stream": True}
        return await first(await p.value(p.client.chat.completions.create(**fields)))

    with conversation("c1"):
        await p.attempt(begin)
    await p.ask(1)
    assert p.errors == ["client_cancelled", ""]


@scene()
async def a_body_that_is_no_json(p: Program) -> None:
    async def post() -> object:
        answer = await p.value(p.twin("http_client")().post("/chat/completions", content=b"{nope"))
        return answer.status_code, answer.text

    assert (await p.attempt(post))[0] == 400
    assert p.engines_called == []


@scene()
async def transfer_params_of_the_application(p: Program) -> None:
    for turn in range(2):
        await p.ask(turn, extra_body={"kv_transfer_params": {"do_remote_prefill": True}})
    assert p.engine.calls[-1].body["kv_transfer_params"] == {"do_remote_decode": True}


# ---- the broker -----------------------------------------------------------------------------------------------


@scene(lambda: {"wait_s": 0})
async def no_broker_and_no_fallback(p: Program) -> None:
    p.broker.stop()
    hurry(p.conserve)
    assert type(await p.ask(0)).__name__ == "BrokerUnavailable"
    assert type(await p.get("/models")).__name__ == "BrokerUnavailable"
    p.broker.start()
    be_patient(p.conserve)
    await p.ask(0)
    assert p.errors == ["BrokerUnavailable", ""]


@scene(lambda: {**FALLBACK, "on_broker_unavailable": "raise"})
async def a_fallback_that_is_not_wanted(p: Program) -> None:
    p.broker.stop()
    hurry(p.conserve)
    assert type(await p.ask(0)).__name__ == "BrokerUnavailable"


@scene(lambda: dict(FALLBACK))
async def fallback_engines(p: Program) -> None:
    p.broker.stop()
    hurry(p.conserve)
    for name in ("a", "b"):
        await p.ask(0, name=name)
        await p.ask(1, name=name, stream=True)
    called = p.engines_called
    assert called[0::2] == called[1::2]
    p.broker.start()
    be_patient(p.conserve)
    p.broker.clock.advance(5_000)
    await p.ask(2, name="a")
    assert p.engines_called[4:] == ["p0", "d0"]


@scene(lambda: {**FALLBACK, "engine": ScriptedEngine(EngineReply.unreachable(), then="answer")})
async def a_fallback_engine_that_is_gone(p: Program) -> None:
    p.broker.stop()
    hurry(p.conserve)
    await p.ask(0)
    assert sorted(p.engines_called) == ["f0", "f1"]


@scene(lambda: {"wait_s": 0})
async def a_model_that_nobody_serves(p: Program) -> None:
    error = await p.ask(0, model="unheard-of")
    assert (type(error).__name__, error.reason) == ("LeaseRefused", "unknown_model")


@scene(lambda: {"broker": InMemoryBroker(small_fleet(decoders=0))})
async def a_fleet_without_engines(p: Program) -> None:
    assert type(await p.get("/models")).__name__ == "EngineUnavailable"


@scene(
    lambda: {
        "broker": InMemoryBroker(small_fleet(decoders=1), settings=BrokerSettings(placement=PAPER, ttl_ms=10_000)),
        **engines(d0=[EngineReply.chat(prompt_tokens=99_000)])(),
    }
)
async def admission_that_is_waited_for(p: Program) -> None:
    await p.ask(0, name="a")
    await p.ask(name="b", messages=[{"role": "user", "content": "other " * 2_000}])
    assert p.turns.records[1].lease_wait_ms >= 9_000


class _Garbage(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """What stands where the broker should be: somebody's web page."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, html="<h1>It works!</h1>", request=request)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return self.handle_request(request)


@scene(lambda: {"broker_transport": _Garbage(), "wait_s": 0})
async def a_server_that_is_no_broker(p: Program) -> None:
    assert type(await p.ask(0)).__name__ == "ProtocolError"


@scene(lambda: {**FALLBACK, "broker_transport": _Garbage()})
async def a_server_that_is_no_broker_with_fallback(p: Program) -> None:
    await p.ask(0)
    assert p.errors == [""]
    assert p.turns.records[0].loss == "broker_unavailable"

"""Only type-checked: a test of an agent with no network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import assert_type

from conserve_sdk import ConServe
from conserve_sdk.testing import (
    BrokerExchange,
    EngineCall,
    EngineReply,
    FakeClock,
    InMemoryBroker,
    NetworkDenied,
    ScriptedEngine,
    ToolCall,
    UnexpectedCall,
    deny_network,
    small_fleet,
)


def in_tests() -> Iterator[ConServe]:
    clock = FakeClock(start_ms=0)
    broker = InMemoryBroker(small_fleet(decoders=3), clock=clock, waiting="block")
    calls = EngineReply.chat(tool_calls=[ToolCall("look", {"name": "a"})]).taking(30, between_ms=5)
    engine = ScriptedEngine(calls, answered, then="answer", prefills="answer", clock=clock)
    engine.script("d0", EngineReply.unreachable()).add(EngineReply.response_stream("a", "b").dropped(after=1))
    with deny_network(), ConServe(broker.url, broker_transport=broker, engine_transport=engine) as conserve:
        yield conserve
    try:
        engine.assert_complete()
    except (UnexpectedCall, NetworkDenied) as denied:
        assert_type(str(denied), str)
    assert_type(engine.turns, list[EngineCall])
    assert_type(broker.exchanges, list[BrokerExchange])
    assert_type(clock.advance(5) > 3, bool)
    guard: AbstractContextManager[object] = deny_network()
    with guard:
        clock.now_ms()


def answered(call: EngineCall) -> EngineReply:
    return EngineReply.chat(str(call.messages[-1]["content"]), cached_tokens=3)


def testing_wrong(call: EngineCall, exchange: BrokerExchange) -> None:
    InMemoryBroker(waiting="sometimes")  # type: ignore[arg-type]
    ScriptedEngine(then="shrug")  # type: ignore[arg-type]
    ScriptedEngine("hello")  # type: ignore[arg-type]
    EngineReply.chat(text=3)  # type: ignore[arg-type]
    EngineReply(200)  # type: ignore[call-arg]
    ToolCall("look", 3)  # type: ignore[arg-type]
    FakeClock("now")  # type: ignore[arg-type]
    small_fleet(3)  # type: ignore[call-arg, arg-type]
    deny_network(allow=[80])  # type: ignore[call-arg]
    call.engine = "d1"  # type: ignore[misc]
    EngineCall("d0")  # type: ignore[call-arg]
    exchange.status = 200  # type: ignore[misc]
    BrokerExchange("POST")  # type: ignore[call-arg]
    print(UnexpectedCall("m").call)  # type: ignore[attr-defined]
    print(NetworkDenied("m").address)  # type: ignore[attr-defined]

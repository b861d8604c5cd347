"""A stream names its tokens only when it is asked; the broker's ledger grows with the conversation anyway."""

from __future__ import annotations

from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine

SILENT = EngineReply.chat_stream("o", "k", usage=False)


def ledger(world) -> int:
    assert world.conserve.flush()
    (lease,) = world.broker.core.leases()
    return lease.ledger_tokens


def history(turns: int) -> list[dict]:
    messages = [{"role": "user", "content": "hello " * 400}]
    for _ in range(turns):
        messages += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "a tool's output " * 500}]
    return messages


def test_the_ledger_grows_without_usage(make_world) -> None:
    world = make_world(engine=ScriptedEngine(EngineReply.prefill(), SILENT, SILENT))
    world.turn(messages=history(0), stream=True)
    first = ledger(world)
    world.turn(messages=history(1), stream=True)
    assert ledger(world) > first + 1_500  # 8,000 bytes more, at four bytes a token


def test_a_guess_never_shrinks_the_ledger(make_world) -> None:
    world = make_world(engine=ScriptedEngine(EngineReply.prefill(), EngineReply.chat(prompt_tokens=9_000), SILENT))
    world.turn(messages=history(0))
    assert ledger(world) == 9_005
    world.turn(messages=history(1), stream=True)
    assert ledger(world) == 9_005


def test_a_turn_that_failed_teaches_nothing(make_world) -> None:
    broker = InMemoryBroker(settings=BrokerSettings(placement=PAPER))
    world = make_world(
        broker=broker,
        engine=ScriptedEngine(EngineReply.prefill(), EngineReply.chat(), EngineReply.failure(400, "too long")),
    )
    world.turn(messages=history(0))
    before = ledger(world)
    assert world.turn(messages=history(9)).error is not None
    assert ledger(world) == before

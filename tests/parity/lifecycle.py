"""Scenes about the life of leases: parked, given back, resumed, moved on the broker's word, lost."""

from __future__ import annotations

from conserve_sdk import Timeouts
from conserve_sdk.testing import EngineReply
from tests.parity.program import Program
from tests.parity.scenes import scene
from tests.sdk.directed import DirectedBroker
from tests.support.dialogue import LONG, follow_up


@scene()
async def park_and_resume(p: Program) -> None:
    await p.ask(0)
    assert await p.do("park", "c1") == 1
    assert [lease.activity for lease in p.broker.core.leases()] == ["parked"]
    await p.ask(1)
    assert await p.do("park", "c1") == 1
    p.broker.clock.advance(3_600_000)
    await p.ask(2)
    assert p.engines_called == ["p0", "d0", "d0", "p0", "d0"]
    assert [record.first_turn for record in p.turns.records] == [True, False, True]


@scene()
async def release(p: Program) -> None:
    await p.ask(0)
    await p.ask(0, name="c2")
    assert await p.do("release", "c1") == 1
    assert await p.do("release", "c1") == 0
    assert p.broker.core.lease_count() == 1
    await p.ask(1)
    assert p.turns.records[-1].first_turn


@scene(lambda: {"timeouts": Timeouts(broker_s=0.2)})
async def park_and_release_without_a_broker(p: Program) -> None:
    await p.ask(0)
    p.broker.stop()
    assert await p.do("park", "c1") == 0
    assert await p.do("release", "c1") == 0


@scene()
async def idle(p: Program) -> None:
    p.engine.script("d0", EngineReply.chat(tool="look"))
    await p.ask(0)
    assert p.conserve.idle("c1") == 1
    await p.ask(1)
    assert p.conserve.idle("c1") == 0


@scene()
async def close_gives_back_what_it_is_told_to(p: Program) -> None:
    await p.ask(0)
    await p.do("close", release=True)
    assert p.broker.core.lease_count() == 0
    assert p.conserve.closed
    assert type(await p.ask(1)).__name__ == "LeaseClosed"
    await p.do("close")
    await p.do("close", release=True)


@scene()
async def a_block_closes_its_object(p: Program) -> None:
    async with p.inside(p.another()) as other:
        client = p.twin("openai_client", other)(max_retries=0)
        await p.call("chat.completions.create", client=client, messages=[{"role": "user", "content": "hello"}])
        assert other.flush()
    assert other.closed
    assert p.broker.core.lease_count() == 1, "a lease belongs to its conversation, not to the object"


@scene()
async def a_second_process_goes_on(p: Program) -> None:
    await p.ask(0)
    other = p.another(on_turn=p.turns)
    client = p.twin("openai_client", other)(max_retries=0)
    headers = {"X-ConServe-Conversation": "c1"}
    await p.call("chat.completions.create", client=client, messages=follow_up(1), extra_headers=headers)
    await p.do("close", of=other)
    assert p.engines_called == ["p0", "d0", "d0"]
    assert not p.turns.records[-1].first_turn


@scene()
async def a_lease_that_ran_out(p: Program) -> None:
    await p.ask(0)
    p.broker.clock.advance(61_000)
    await p.ask(1, stream=True)
    assert p.engines_called == ["p0", "d0", "p0", "d0"]


@scene()
async def a_decoder_that_restarted(p: Program) -> None:
    await p.ask(0)
    p.broker.restart_engine("d0")
    await p.ask(1)
    await p.ask(2)
    assert p.turns.records[-1].first_turn


@scene()
async def a_broker_that_forgot_everything(p: Program) -> None:
    await p.ask(0)
    p.broker.restart(lose_state=True)
    await p.ask(1)
    await p.ask(2)
    assert p.engines_called == ["p0", "d0", "d0", "d0"]
    assert p.broker.core.lease_count() == 1


# ---- the broker's word ----------------------------------------------------------------------------------------


async def _move(p: Program, *, stream: bool) -> None:
    await p.ask(0)
    p.broker.directive, p.broker.reason = "re_lease", "draining"
    await p.ask(1, stream=stream)  # its report is answered with the directive: it is obeyed at the next turn
    p.broker.directive, p.broker.reason = "none", ""
    await p.ask(2, stream=stream)
    await p.ask(3, stream=stream)
    assert len(p.broker.asked) == 1
    assert p.turns.records[-1].epoch == 2


@scene(lambda: {"broker": DirectedBroker()})
async def a_lease_that_moves(p: Program) -> None:
    await _move(p, stream=False)
    assert p.engines_called == ["p0", "d0", "d0", "d0", "d1", "d1"]


@scene(lambda: {"broker": DirectedBroker()})
async def a_lease_that_moves_under_streams(p: Program) -> None:
    await _move(p, stream=True)
    assert p.engines_called == ["p0", "d0", "d0", "d0", "d1", "d1"]


@scene(lambda: {"broker": DirectedBroker()})
async def a_giant_append(p: Program) -> None:
    p.broker.append_threshold_tokens, p.broker.answer = 50, "append"
    await p.ask(0)
    messages = [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "page " * 2_000},
    ]
    await p.ask(messages=messages)
    assert len(p.broker.asked) == 1


@scene(lambda: {"broker": DirectedBroker()})
async def a_move_that_is_refused(p: Program) -> None:
    p.broker.answer = "stay"
    await p.ask(0)
    p.broker.directive, p.broker.reason = "re_lease", "load"
    await p.ask(1)
    await p.ask(2)
    assert p.engines_called == ["p0", "d0", "d0", "d0"]


# ---- lines of a conversation ----------------------------------------------------------------------------------


@scene()
async def a_history_that_was_rewritten(p: Program) -> None:
    system = {"role": "system", "content": "You keep the files. " * 60}
    history = [system, {"role": "user", "content": "first"}]
    for turn in range(3):
        await p.ask(messages=history, stream=turn == 2)
        history += [{"role": "assistant", "content": f"answer {turn}"}, {"role": "user", "content": f"next {turn}"}]
    await p.ask(messages=[system, {"role": "user", "content": "Summary."}, *history[-3:]])
    assert p.broker.core.lease_count() == 1
    assert [exchange.method for exchange in p.broker.exchanges].count("DELETE") == 1


@scene()
async def a_child_that_names_its_parent(p: Program) -> None:
    await p.ask(0, name="boss")
    await p.ask(0, name="worker", extra_headers={"X-ConServe-Parent": "boss"})
    assert len({record.lease_id for record in p.turns.records}) == 2


@scene()
async def a_tiny_request_again_and_again(p: Program) -> None:
    await p.ask(0)
    for stream in (False, True, False):
        await p.ask(messages=[{"role": "user", "content": "A title, please."}], stream=stream)
    assert [record.lease_id is None for record in p.turns.records] == [False, True, True, True]

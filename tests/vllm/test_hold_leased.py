"""Holds by lease (`conserve_vllm.leased_nixl`): each for its own time, one per conversation, and let go of early.

The guard writes what the connector reads, so these go through the guard; `test_hold.py` is the stock connector.
"""

import time
from contextlib import closing

import pytest

from .guarded import HOLD
from .leased import Conversation, Stage

BLOCK = 32


@pytest.fixture
def idle(leased):
    """A decoder on which nothing is held any more; holds of other tests end by themselves."""
    leased.settled("d0", lambda now: now.kv_used_tokens == 0, budget_s=90.0)
    yield leased
    for lease_id in ("long", "short", "one", "let go", "mine"):
        release(leased, lease_id)


def release(leased, lease_id):
    headers = {"X-ConServe-Lease": leased.token(lease_id=lease_id)}
    answer = leased.http.post(f"{leased.fleet.engines['d0'].url}/conserve/release", headers=headers)
    assert (answer.status_code, answer.content) == (204, b"")


def turn(leased, messages, **lease):
    leased.lease_token = leased.token(**lease)
    answer = leased.ask("d0", leased.body(messages) | {"kv_transfer_params": HOLD})
    assert leased.said(answer) == leased.said(leased.ask("a0", leased.body(messages)))
    messages += [{"role": "assistant", "content": leased.said(answer)}, {"role": "user", "content": "and now"}]
    return answer["usage"]["prompt_tokens"] // BLOCK * BLOCK


def held_tokens(leased):
    return leased.settled("d0", lambda now: now.running == 0).kv_used_tokens


def test_two_leases_are_held_for_two_times(idle):
    short, long = idle.task("held briefly", words=300), idle.task("held long", words=300)
    expired = idle.fleet.metrics("d0").expired_holds
    size = turn(idle, long, lease_id="long", hold_ms=30_000)
    turn(idle, short, lease_id="short", hold_ms=2_000)
    left = idle.settled("d0", lambda now: now.expired_holds == expired + 1)
    assert size <= left.kv_used_tokens < 2 * size, "the short one is over, the long one is not"


def test_a_conversation_has_one_hold_however_many_turns(idle):
    messages = idle.task("one hold", words=300)
    expired = idle.fleet.metrics("d0").expired_holds
    for number in range(1, 4):
        size = turn(idle, messages, lease_id="one")
        idle.settled("d0", lambda now, number=number: now.expired_holds == expired + number - 1)
        assert size <= held_tokens(idle) <= size + 2 * BLOCK


def test_holding_survives_pressure_and_letting_go_frees_at_once(idle, guarded_fleet):
    messages = idle.task("let go", words=300)
    size = turn(idle, messages, lease_id="let go")
    idle.lease_token = ""
    idle.fill_cache("d0", tag="let go")
    before = guarded_fleet.metrics("d0")
    turn(idle, messages, lease_id="let go")
    counted = idle.settled("d0", lambda now: now.since(before).requests == 1).since(before)
    assert counted.prompt_cached_tokens >= size

    started_s = time.monotonic()
    release(idle, "let go")

    idle.settled("d0", lambda now: now.kv_used_tokens == 0, budget_s=20.0)
    assert time.monotonic() - started_s < 20, "not by the end of its time"


def test_only_the_lease_itself_lets_go(idle, guarded_fleet):
    turn(idle, idle.task("mine to keep", words=100), lease_id="mine")
    held = held_tokens(idle)
    assert held > 0
    assert idle.http.post(f"{guarded_fleet.engines['d0'].url}/conserve/release").status_code == 403
    release(idle, "another")
    assert held_tokens(idle) == held


@pytest.mark.parametrize("end", ["release", "park"])
def test_the_broker_lets_go_for_a_conversation_that_ends_or_waits_for_a_human(idle, guarded_fleet, tmp_path, end):
    expired = guarded_fleet.metrics("d0").expired_holds
    freed = idle.identity("d0")["guard"].get("released", 0)
    with closing(Stage(guarded_fleet, idle, tmp_path)) as stage:
        engines = [entry for entry in guarded_fleet.broker_engines() if entry["id"] in ("p0", "d0")]
        conserve = stage.sdk(stage.broker(engines=engines, lease={"hold_ms": 30_000}))
        talk, client = Conversation(stage, f"over by {end}", words=300), stage.client(conserve)
        talk.ask(client)
        talk.ask(client)
        assert stage.last.migrated is False, "the second turn is a follow-up"
        assert held_tokens(idle) > 300, "held between turns"
        assert conserve.flush(20)

        started_s = time.monotonic()
        getattr(conserve, end)(talk.name)

        idle.settled("d0", lambda now: now.kv_used_tokens == 0, budget_s=20.0)
        assert time.monotonic() - started_s < 20, "not by the end of its time"
        assert idle.identity("d0")["guard"]["released"] == freed + 1
        assert guarded_fleet.metrics("d0").expired_holds > expired, "vLLM counts what it freed without a reader"
        talk.ask(client)
        assert conserve.flush(20)
        conserve.release(talk.name)  # or the next test waits for the hold's end
        idle.settled("d0", lambda now: now.kv_used_tokens == 0, budget_s=20.0)

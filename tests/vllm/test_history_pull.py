"""A giant append on the prefiller: it pulls the history from the decoder instead of computing it again.

vLLM's `bidirectional_kv_xfer`, on the prefiller alone: the decoder keeps its blocks by a hold, which ends by itself. On
a decoder the flag itself keeps blocks, too, and some of them for good (the last test), so nothing here sets it there.
"""

import httpx2
import pytest

from conserve_lab.vllm import FleetOptions, VllmFleet
from conserve_sdk.core.units import Ms, Tokens

from .raw import REQUEST_BUDGET_S, RawProtocol

BLOCK = 32
HOLD = {"do_remote_decode": True}
HISTORY, APPEND, ANSWER = 1_000, 1_500, 25


@pytest.fixture(scope="module")
def pulling_fleet(vllm_here):
    """A prefiller that may pull from decoders; `d1` with the flag as well."""
    options = FleetOptions(
        references=1,
        max_model_tokens=Tokens(4_096),
        kv_cache_tokens=Tokens(12_288),
        hold_ms=Ms(30_000),
        history_pulls=frozenset({"p0", "d1"}),
    )
    with VllmFleet(options) as running:
        yield running


@pytest.fixture
def raw(pulling_fleet):
    with httpx2.Client(timeout=REQUEST_BUDGET_S, trust_env=False) as http:
        yield RawProtocol(pulling_fleet, http)


def completion(raw, prompt, *, max_tokens=ANSWER):
    body = {"model": raw.fleet.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return body | {"ignore_eos": True, "return_token_ids": True}


def ask(raw, engine_id, body):
    return raw.ask(engine_id, body, path="completions")


def prefill(raw, body, **params):
    leg = body | {
        "max_tokens": 1,
        "kv_transfer_params": {**params, "do_remote_decode": True, "do_remote_prefill": False},
    }
    return ask(raw, "p0", leg)["kv_transfer_params"]


def test_a_prefiller_pulls_the_history_and_the_decoder_only_what_is_new(raw):
    first = completion(raw, raw.ids("history", HISTORY))
    turn = ask(raw, "d0", first | {"kv_transfer_params": prefill(raw, first) | HOLD})
    history = first["prompt"] + turn["choices"][0]["token_ids"]
    raw.fill_cache("p0", tag="forgets")
    before = {engine_id: raw.fleet.metrics(engine_id) for engine_id in ("p0", "d0")}
    giant = completion(raw, history + raw.ids("append", APPEND))

    moved = prefill(raw, giant, **turn["kv_transfer_params"])
    answer = ask(raw, "d0", giant | {"kv_transfer_params": moved})

    assert raw.said(answer) == raw.said(ask(raw, "a0", giant))
    known = len(history) - 1  # the last token of an answer has no KV yet
    weight = raw.fleet.kv_bytes_per_token
    pulled = raw.settled("p0", lambda now: now.since(before["p0"]).transfers >= 1).since(before["p0"])
    assert (pulled.transfers, pulled.failed_transfers) == (1, 0)
    assert pulled.prompt_transferred_tokens == known
    assert pulled.prompt_computed_tokens == len(giant["prompt"]) - known
    assert pulled.transferred_bytes == -(-known // BLOCK) * BLOCK * weight
    brought = raw.settled("d0", lambda now: now.since(before["d0"]).transfers >= 1).since(before["d0"])
    missing = -(-len(giant["prompt"]) // BLOCK) - known // BLOCK
    assert (brought.transfers, brought.transferred_bytes) == (1, missing * BLOCK * weight)
    for engine_id in ("p0", "d0"):  # each side was told that its blocks are read
        raw.settled(engine_id, lambda now: now.kv_used_tokens == 0, budget_s=90.0)


def test_the_same_flag_on_a_decoder_keeps_blocks_for_good(raw):
    # Rule: the flag never stands on a decoder. What it keeps has a time of its own, but vLLM's worker learns of that
    # only for requests that pulled; the blocks of any other request with params, however empty, never come back.
    leaked = completion(raw, raw.ids("leaked", HISTORY))
    ask(raw, "d1", leaked | {"kv_transfer_params": {"do_remote_decode": False}})
    kept = raw.settled("d1", lambda now: now.running == 0).kv_used_tokens
    assert kept >= HISTORY

    expired = raw.fleet.metrics("d1").expired_holds
    pulled = completion(raw, raw.ids("pulled", HISTORY))
    ask(raw, "d1", pulled | {"kv_transfer_params": prefill(raw, pulled)})
    left = raw.settled("d1", lambda now: now.expired_holds > expired, budget_s=60.0)

    assert kept <= left.kv_used_tokens < 2 * kept, "the later one is over, the earlier one is not"

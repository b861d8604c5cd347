"""A receipt in sentences: every rule and verdict of the core has words, and unknown ones are named as they are."""

from typing import Any

import httpx2
import pytest

from conserve_sdk._desk.words import _DECODER, _HERE, _THERE, _VERDICTS, in_words, span
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.core.vocabulary import EngineState
from conserve_sdk.protocol import LeaseExplanation
from conserve_sdk.testing import FakeClock, InMemoryBroker


def explained(**settings: Any) -> LeaseExplanation:
    """A lease of a broker in memory, some seconds after its grant."""
    clock = FakeClock()
    broker = InMemoryBroker(settings=BrokerSettings(**settings), clock=clock)
    http = httpx2.Client(transport=broker, base_url=broker.url)
    body = {"conversation_id": "task-7", "lineage": "main", "model": "test-model", "first_turn_input_tokens": 4_000}
    grant = http.post("/v1/leases", json=body).json()
    clock.advance(12_000)
    answer = http.get(f"/v1/leases/{grant['lease_id']}/explain")
    return LeaseExplanation.model_validate_json(answer.content)


def test_a_lease_that_moves_its_kv() -> None:
    whose, decoder, prefill, now = explained(placement=PAPER).in_words
    assert whose == (
        "Conversation task-7 (lineage main, tenant default, model test-model) asked for 4,000 tokens and got this "
        "lease at once, 12.0 s ago."
    )
    assert decoder == (
        "Its decoder is d0, because it had the lowest load of the decoders with room. At that moment 0 of its 100,000 "
        "KV tokens were leased (0 %)."
    )
    assert prefill == (
        "The prompt is prefilled on p0, because the preset always uses a prefiller; then its KV moves to d0 once."
    )
    assert now == (
        "It has been busy for 12.0 s, after 0 turns; it moved no KV, holds 4,000 tokens and ends in 48.0 s unless "
        "renewed."
    )


def test_a_lease_that_stays_tells_the_estimates() -> None:
    prefill = explained().in_words[2]
    assert prefill.startswith("The prompt is prefilled on d0 itself, because there it was expected to be ready first.")
    assert "Estimates: d0 400 ms, p0 " in prefill


def changed(lease: LeaseExplanation, **changes: Any) -> str:
    decision = lease.decision.model_copy(update=changes.pop("decision", {}))
    return " ".join(in_words(lease.model_copy(update={**changes, "decision": decision})))


def test_what_else_there_is_to_say() -> None:
    lease = explained()
    assert "after waiting 3.0 s for room" in changed(lease, decision={"waited_ms": 3_000})
    assert "It took the place of lease lease-1." in changed(lease, supersedes="lease-1")
    assert "after 1 turn; it moved its KV once" in changed(lease, turns=1, migrations=1)
    assert "Its decoder has left the fleet." in changed(lease, decoder_now=None)
    gone = lease.decoder_now.model_copy(update={"state": "gone", "detail": "no answer for 15 s"})
    assert "Its decoder is gone (no answer for 15 s)." in changed(lease, decoder_now=gone)
    full = lease.decision.candidates[1].model_copy(update={"role": "decoder", "verdict": "over_watermark"})
    told = changed(lease, decision={"candidates": (full,)})
    assert f"Not considered: {full.engine_id} (above its KV watermark)." in told
    assert "At that moment" not in told


def test_rules_that_are_new_are_named() -> None:
    lease = explained()
    assert "because the rule by_moonlight chose it" in changed(lease, decision={"rule": "by_moonlight"})
    assert "because rule by_moonlight" in changed(lease, decision={"prefill_rule": "by_moonlight"})
    assert "because the prefillers were not answering" in changed(lease, decision={"prefill_rule": "suspect"})
    assert "is prefilled on d0 itself." in changed(lease, decision={"prefill_rule": "readopted"})
    moves = explained(placement=PAPER)
    assert "because the rule by_moonlight chose it" in changed(moves, decision={"prefill_rule": "by_moonlight"})


@pytest.mark.parametrize("state", [state for state in EngineState if state is not EngineState.READY])
def test_every_state_of_an_engine_has_words(state: EngineState) -> None:
    assert state.value in _VERDICTS


def test_the_rules_of_the_receipt_have_words() -> None:
    """The rules that `conserve_sdk.core.receipt` documents."""
    assert {"most_free_kv", "hint", "parent", "append", "re_lease_draining", "re_lease_load"} <= set(_DECODER)
    here = {
        "score",
        "below_minimum",
        "never",
        "hosted_on_prefiller",
        "cannot_move",
        "no_prefiller",
        "no_usable_prefiller",
    }
    assert here <= set(_HERE)
    assert {"extra_work", "no_common_transfer_group", "suspect"} <= set(_VERDICTS)
    assert set(_THERE) == {"score", "always_prefiller", "old_decoder"}


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        (-5, "0.0 s"),
        (1_240, "1.2 s"),
        (59_900, "59.9 s"),
        (61_000, "1 min 1 s"),
        (3_599_000, "59 min 59 s"),
        (7_500_000, "2 h 5 min"),
    ],
)
def test_spans(ms: int, words: str) -> None:
    assert span(ms) == words

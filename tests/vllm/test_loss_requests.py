"""Requests that real vLLM would answer wrongly, or not survive, if the SDK did not stand between."""

import itertools

import httpx2
import openai
import pytest

from conserve_sdk import LeaseRefused, Timeouts

from .leased import HOLD_OFF, Conversation, Meter, within

pytestmark = pytest.mark.usefixtures("emptied")

BUDGET_S = 60.0
DEADLY = {"do_remote_prefill": True}
"""Alone, it ends the decoder process (see test_dangers)."""


def test_transfer_params_of_the_application_do_not_reach_vllm(stage, fleet):
    client = stage.client(stage.sdk(stage.broker(**HOLD_OFF)))
    talk = Conversation(stage, "deadly")
    with within(BUDGET_S):
        for _ in range(3):
            answer = client.chat.completions.create(**talk.body, extra_body={"kv_transfer_params": DEADLY})
            talk.hear(answer.choices[0].message.content)
    assert all(fleet.is_alive(engine_id) for engine_id in fleet.engines)
    assert not any(record.error or record.loss for record in stage.turns.records)
    assert [record.migrated for record in stage.turns.records] == [True, False, False]


def test_params_older_than_their_deadline_are_not_sent(stage, fleet, recovered):
    network = stage.network()
    at_once = Timeouts(transfer_s=0.000_1)  # over before the next line of code runs
    client = stage.client(stage.sdk(stage.broker(**HOLD_OFF), engine_transport=network, timeouts=at_once))
    talk = Conversation(stage, "late")
    meter = Meter(fleet)
    with within(BUDGET_S):
        talk.ask(client)
    recovered("the prefilled KV is too old to be fetched", stage.last_s)
    assert (stage.last.loss, stage.last.error, stage.last.migrated) == ("transfer_expired", "", False)
    assert [call.engine_id == "p0" for call in network.calls] == [True, False]
    assert not any(call.pulls for call in network.calls)
    talk.ask(client)
    assert stage.last.loss == ""
    counted = meter.settled(requests=2)
    assert (counted.decoders.transfers, counted.decoders.failed_transfers) == (0, 0)


def test_a_retry_by_openai_does_not_send_params_again(stage, recovered):
    """Both decoders answer 500 until the SDK has given up once; each set of params goes out once at most."""
    failures = itertools.count(1)

    def fail(call):
        if call.engine_id == "p0" or next(failures) > 4:
            return None
        return httpx2.Response(500, json={"error": {"message": "Internal server error", "code": 500}})

    network = stage.network(before=fail)
    client = stage.client(stage.sdk(stage.broker(**HOLD_OFF), engine_transport=network), max_retries=2)
    talk = Conversation(stage, "retried")
    with within(BUDGET_S):
        talk.ask(client)
    pulls = [call.params["remote_request_id"] for call in network.calls if call.pulls]
    prefills = [call for call in network.calls if call.engine_id == "p0"]
    assert len(pulls) == len(set(pulls)) == len(prefills) >= 1, "every set of params has its own prefill"
    first, last = stage.turns.records
    both_s = (first.duration_ms + last.duration_ms) / 1000
    recovered("four answers of 500, openai's own retry after them: both turns, without its pause", both_s)
    assert (first.error, first.loss) == ("http_500", "transfer_failed")
    assert last.error == ""


def test_kv_that_was_pulled_for_an_answer_that_got_lost_is_not_pulled_again(stage, fleet, recovered):
    """The decoder has fetched the KV, the prefiller has freed it: the same params would now answer wrong text."""
    lost = []

    def lose(call):
        if call.pulls and not lost:
            lost.append(call)
            raise httpx2.ReadError("the answer got lost")

    network = stage.network(after=lose)
    client = stage.client(stage.sdk(stage.broker(**HOLD_OFF), engine_transport=network))
    talk = Conversation(stage, "pulled, and lost", words=300)
    meter = Meter(fleet)
    with within(BUDGET_S):
        talk.ask(client)
    recovered("the answer to a first turn gets lost after its KV was fetched", stage.last_s)
    assert len(lost) == 1
    assert (stage.last.error, stage.last.loss, stage.last.migrated) == ("", "transfer_failed", False)
    pulls = [call.params["remote_request_id"] for call in network.calls if call.pulls]
    assert len(pulls) == len(set(pulls)) == len([call for call in network.calls if call.engine_id == "p0"])
    counted = meter.settled(requests=2, transfers=len(pulls))
    assert (counted.decoders.transfers, counted.decoders.failed_transfers) == (len(pulls), 0)
    talk.ask(client)
    assert (stage.last.error, stage.last.loss, stage.last.hops) == ("", "", 1)


def test_a_follow_up_longer_than_the_model_gets_vllms_own_words(stage, fleet, recovered):
    client = stage.client(stage.sdk(stage.broker(**HOLD_OFF)))
    talk = Conversation(stage, "too long")
    talk.ask(client)
    lease_id = stage.last.lease_id
    longest = fleet.engines["d0"].max_model_len_tokens
    monster = {"role": "user", "content": stage.raw.prose("giant output", 2 * longest)}
    body = {**talk.body, "messages": [*talk.body["messages"], monster]}
    with within(BUDGET_S), pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**body, extra_headers={"X-ConServe-Conversation": "too long"})
    assert str(longest) in str(caught.value)
    assert caught.value.param == "input_tokens"
    recovered("a prompt is too long: until the error", stage.last_s)
    assert stage.last.error == "http_400"
    talk.ask(client)
    assert (stage.last.lease_id, stage.last.hops, stage.last.loss) == (lease_id, 1, "")
    assert stage.last.cached_tokens > 0


def test_a_first_turn_longer_than_the_model_is_refused_in_words(stage, fleet):
    longest = fleet.engines["d0"].max_model_len_tokens
    client = stage.client(stage.sdk(stage.broker(**HOLD_OFF)))
    with within(BUDGET_S), pytest.raises((openai.BadRequestError, LeaseRefused)) as caught:
        Conversation(stage, "giant", words=3 * longest).ask(client)
    assert "too long" in str(caught.value) or str(longest) in str(caught.value)
    talk = Conversation(stage, "giant")  # the same conversation, with something that fits
    talk.ask(client)
    assert stage.last.error == ""

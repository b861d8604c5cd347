"""Engines lost under the SDK: each turn still gets the right answer, within a budget, and the loss is counted.

Budgets are those of a loaded two-core machine; `Conversation` compares each answer with the aggregated server.
"""

from collections import Counter

import anyio
import httpx2
import openai
import pytest

from .leased import HOLD_OFF, Conversation, Meter, within

pytestmark = pytest.mark.usefixtures("mended", "emptied")

LOCAL_BUDGET_S = 40.0
"""Up to 5 s of vLLM's own handshake with a dead prefiller, then a short prompt computed by the decoder."""
FAILOVER_BUDGET_S = 40.0


def test_prefiller_killed_between_the_legs(stage, fleet, recovered):
    def kill_after_prefill(call):
        if call.engine_id == "p0":
            fleet.kill("p0")

    client = stage.client(stage.sdk(stage.broker(**HOLD_OFF), engine_transport=stage.network(after=kill_after_prefill)))
    talk = Conversation(stage, "orphan")
    before = fleet.metrics("d0") + fleet.metrics("d1")
    with within(LOCAL_BUDGET_S):
        talk.ask(client)
    record = stage.last
    recovered("a prefiller dies between the legs of a first turn", stage.last_s)
    assert (record.loss, record.error, record.migrated) == ("transfer_failed", "", False)
    with within(LOCAL_BUDGET_S):
        talk.ask(client)
    assert (stage.last.hops, stage.last.loss, stage.last.decoder_id) == (1, "", record.decoder_id)
    assert stage.last.cached_tokens > 0
    assert (fleet.metrics("d0") + fleet.metrics("d1")).since(before).transfers == 0


def test_prefiller_dead_before_the_first_turn(stage, fleet, recovered):
    client = stage.client(stage.sdk(stage.broker(**HOLD_OFF)))
    fleet.kill("p0")
    talk = Conversation(stage, "no prefiller")
    with within(LOCAL_BUDGET_S):
        talk.ask(client)
    recovered("a prefiller is dead before a first turn", stage.last_s)
    assert (stage.last.loss, stage.last.error, stage.last.migrated) == ("prefill_failed", "", False)
    talk.ask(client)
    assert (stage.last.loss, stage.last.error) == ("", "")


def test_decoder_killed_between_turns_hands_the_conversation_over(stage, fleet, recovered):
    client = stage.client(stage.sdk(stage.broker(**HOLD_OFF)))
    talk = Conversation(stage, "hand over")
    talk.ask(client)
    first = stage.last
    recovered("nothing: an undisturbed first turn, for comparison", stage.last_s)
    fleet.kill(first.decoder_id)
    with within(FAILOVER_BUDGET_S):
        talk.ask(client)
    second = stage.last
    recovered("a decoder dies between turns: answered by another", stage.last_s)
    assert (second.loss, second.error, second.failovers) == ("decoder_failed", "", 1)
    assert second.decoder_id != first.decoder_id
    assert second.epoch == first.epoch + 1
    assert second.migrated, "the new lease has a migration of its own"
    talk.ask(client)
    third = stage.last
    assert (third.lease_id, third.hops, third.loss) == (second.lease_id, 1, "")
    assert third.cached_tokens > 0


def test_streamed_turn_fails_over_before_its_first_byte(stage, fleet, recovered):
    client = stage.client(stage.sdk(stage.broker(**HOLD_OFF)))
    talk = Conversation(stage, "streamed hand over")
    talk.ask(client, stream=True)
    fleet.kill(stage.last.decoder_id)
    with within(FAILOVER_BUDGET_S):
        talk.ask(client, stream=True)
    recovered("the same in a streamed turn, before its first byte", stage.last_s)
    assert (stage.last.loss, stage.last.error, stage.last.failovers) == ("decoder_failed", "", 1)


def test_decoder_restarted_between_turns_is_noticed_and_leased_again(stage, fleet, recovered):
    conserve = stage.sdk(stage.broker(**HOLD_OFF))
    client = stage.client(conserve)
    talk = Conversation(stage, "amnesia")
    talk.ask(client)
    first = stage.last
    fleet.restart(first.decoder_id)
    with within(LOCAL_BUDGET_S):
        talk.ask(client)
    recovered("a decoder restarts between turns: the turn that finds its cache empty", stage.last_s)
    # The engine lost all it knew: either the lease was still believed in and the prompt computed anew, or not.
    assert stage.last.error == ""
    assert stage.last.migrated or stage.last.cached_tokens == 0
    assert conserve.flush(LOCAL_BUDGET_S)  # the broker has seen the new incarnation by its scrapes, and says so
    with within(LOCAL_BUDGET_S):
        talk.ask(client)
    assert stage.last.error == ""
    assert stage.last.lease_id != first.lease_id


def test_both_decoders_dead_is_an_error_that_openai_knows(stage, fleet, recovered):
    client = stage.client(stage.sdk(stage.broker(**HOLD_OFF), wait_s=1.0), timeout=LOCAL_BUDGET_S)
    talk = Conversation(stage, "nobody left")
    talk.ask(client)
    fleet.kill("d0")
    fleet.kill("d1")
    with within(LOCAL_BUDGET_S), pytest.raises(openai.APIConnectionError) as caught:
        talk.ask(client)
    recovered("all decoders dead: until the error, with `wait_s` 1", stage.last_s)
    assert isinstance(caught.value.__cause__, httpx2.TransportError)
    assert (stage.last.error, stage.last.loss) == ("unreachable", "decoder_failed")


async def test_eight_conversations_survive_the_death_of_a_decoder(stage, fleet, recovered):
    broker = await anyio.to_thread.run_sync(lambda: stage.broker(**HOLD_OFF))
    talks = [Conversation(stage, f"survivor {number}") for number in range(8)]
    async with stage.sdk(broker) as conserve, conserve.async_openai_client(max_retries=0) as client:

        async def everyone(turns):
            async def hold(talk):
                for _ in range(turns):
                    await talk.aask(client)

            async with anyio.create_task_group() as group:
                for talk in talks:
                    group.start_soon(hold, talk)

        with anyio.fail_after(100):
            await everyone(1)
            # Which decoder got more depends on what earlier tests left behind; the one with most shall die.
            (victim, _), *_ = Counter(record.decoder_id for record in stage.turns.records).most_common()
            async with anyio.create_task_group() as group:
                group.start_soon(everyone, 2)
                group.start_soon(anyio.to_thread.run_sync, fleet.kill, victim)

    assert [len(talk.said) for talk in talks] == [3] * 8
    records = stage.turns.records
    assert any(record.failovers for record in records)
    slowest_ms = max(record.duration_ms for record in records if record.failovers)
    recovered("a decoder dies under eight conversations at once: the slowest failover", slowest_ms / 1000)
    assert not any(record.error for record in records)
    assert all(record.loss == "decoder_failed" for record in records if record.failovers)
    last = {record.conversation_id: record for record in records}
    assert victim not in {record.decoder_id for record in last.values()}


def test_an_engine_without_a_connector_configured_as_a_prefiller(stage, fleet, recovered):
    """The broker believes its configuration; the first turn finds out and is computed where it stays."""
    plain = {**fleet.broker_engines(references=True)[-1], "role": "prefiller", "connector": "nixl"}
    plain["transfer_group"] = fleet.engines["d0"].transfer_group
    decoders = [entry for entry in fleet.broker_engines() if entry["role"] == "decoder"]
    client = stage.client(stage.sdk(stage.broker(engines=[plain, *decoders], **HOLD_OFF)))
    talk = Conversation(stage, "no connector")
    meter = Meter(fleet)
    with within(LOCAL_BUDGET_S):
        talk.ask(client)
        talk.ask(client)
    recovered("a prefiller without a connector", stage.turns.records[0].duration_ms / 1000)
    assert [record.loss for record in stage.turns.records] == ["no_transfer_params", ""]
    assert not any(record.error or record.migrated for record in stage.turns.records)
    assert meter.settled(requests=2).decoders.transfers == 0

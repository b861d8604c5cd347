"""Engines under pressure and clients that leave, through the SDK: right answers, and no KV left in use afterwards.

Seconds to recovery are noted for the report; budgets here are for a loaded machine.
"""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import anyio
import httpx2
import pytest

from conserve_sdk import LeaseRefused

from .leased import DECODERS, HOLD_OFF, Conversation, Meter, Stage, within
from .raw import RawProtocol

BUDGET_S = 100.0
EMPTY_BUDGET_S = 90.0
"""A prefiller's blocks wait 30 s for a decoder that never comes."""


def check_empty(stage, *engine_ids):
    for engine_id in engine_ids or ("p0", *DECODERS):
        left = stage.raw.settled(engine_id, lambda now: now.kv_used_tokens == 0, budget_s=EMPTY_BUDGET_S)
        assert left.running == left.waiting == 0


def test_a_decoder_out_of_blocks_lets_requests_wait_and_answers_all(raw, fleet, recovered):
    """Six prompts of 3,000 tokens at once for a cache of 12,288: none is refused, all are right."""
    bodies = [raw.body(raw.task(f"crowded {number}", words=2_200)) for number in range(6)]
    started_s = time.monotonic()
    with ThreadPoolExecutor(len(bodies)) as pool, within(BUDGET_S):
        answers = list(pool.map(lambda body: raw.ask("d0", body), bodies))
    recovered("a decoder out of blocks, six prompts of 3,000 tokens: the last answer", time.monotonic() - started_s)
    assert sum(answer["usage"]["prompt_tokens"] for answer in answers) > fleet.engines["d0"].kv_capacity_tokens
    assert [raw.said(answer) for answer in answers] == [raw.said(raw.ask("a0", body)) for body in bodies]
    raw.settled("d0", lambda now: now.kv_used_tokens == 0, budget_s=EMPTY_BUDGET_S)


def test_more_than_a_decoder_has_blocks_for_is_refused_by_the_broker_with_its_reason(stage, fleet):
    """Through leases nothing waits inside the engine: the broker lets in what fits, and says what does not."""
    one = [entry for entry in fleet.broker_engines() if entry["id"] in {"p0", "d0"}]
    client = stage.client(stage.sdk(stage.broker(engines=one, **HOLD_OFF), wait_s=1.0))
    talks = [Conversation(stage, f"leased crowd {number}", words=2_200) for number in range(5)]
    refusals = []
    with within(BUDGET_S):
        for talk in talks:
            try:
                talk.ask(client)
            except LeaseRefused as refused:
                refusals.append(str(refused))
    assert refusals
    assert all("tokens of KV free" in refusal for refusal in refusals)
    served = [talk for talk in talks if talk.said]
    assert len(served) >= 2
    served[0].ask(client)  # those that were let in go on
    assert (stage.last.error, stage.last.loss) == ("", "")


def test_a_client_that_leaves_in_mid_stream_leaves_nothing_behind(stage, fleet, recovered):
    client = stage.client(stage.sdk(stage.broker(**HOLD_OFF)))
    talk = Conversation(stage, "leaving", words=300)
    meter = Meter(fleet)
    body = talk.body | {"max_tokens": 3_000, "ignore_eos": True}
    named = {"X-ConServe-Conversation": "leaving"}
    ours = {key: value for key, value in body.items() if key != "ignore_eos"}
    with client.chat.completions.create(
        **ours, stream=True, extra_body={"ignore_eos": True}, extra_headers=named
    ) as stream:
        for number, _ in enumerate(stream):
            if number == 5:
                break
    left_s = time.monotonic()
    check_empty(stage)
    recovered("a client leaves in mid-stream: until no KV is in use", time.monotonic() - left_s)
    counted = meter.settled(requests=0, transfers=1)
    assert counted.decoders.generation_tokens < 2_000, "the engine stopped when nobody listened any more"
    with within(BUDGET_S):
        talk.ask(client)
    assert (stage.last.error, stage.last.loss) == ("", "")
    assert stage.last.cached_tokens > 0, "the prompt's KV is still there"


def test_a_client_that_leaves_between_the_legs_costs_the_prefiller_its_blocks_for_a_while_only(stage, fleet, recovered):
    class Gone(Exception):  # noqa: N818  says what happened
        pass

    def leave(call):
        if call.engine_id != "p0":
            raise Gone

    conserve = stage.sdk(stage.broker(**HOLD_OFF), engine_transport=stage.network(before=leave))
    before = fleet.metrics("p0")
    with pytest.raises(Exception) as caught:
        Conversation(stage, "gone between").ask(stage.client(conserve))
    left_s = time.monotonic()
    assert Gone in {type(error) for error in chain(caught.value)}
    left = stage.raw.settled("p0", lambda now: now.since(before).expired_holds == 1, budget_s=EMPTY_BUDGET_S)
    assert left.since(before).expired_holds == 1
    check_empty(stage)
    recovered("a client leaves between the legs: until the prefiller's KV is free", time.monotonic() - left_s)


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.usefixtures("mended")
async def test_no_kv_stays_in_use_after_a_decoder_died_under_eight_conversations(stage, fleet, recovered):
    broker = await anyio.to_thread.run_sync(lambda: stage.broker(**HOLD_OFF))
    talks = [Conversation(stage, f"bereaved {number}", words=200) for number in range(8)]
    async with stage.sdk(broker) as conserve, conserve.async_openai_client(max_retries=0) as client:
        with anyio.fail_after(BUDGET_S):
            async with anyio.create_task_group() as group:
                for talk in talks:
                    group.start_soon(talk.aask, client)
            (victim, _), *_ = Counter(record.decoder_id for record in stage.turns.records).most_common()
            async with anyio.create_task_group() as group:
                for talk in talks:
                    group.start_soon(talk.aask, client)
                group.start_soon(anyio.to_thread.run_sync, fleet.kill, victim)
    assert not any(record.error for record in stage.turns.records)
    (survivor,) = set(DECODERS) - {victim}
    died_s = time.monotonic()
    await anyio.to_thread.run_sync(check_empty, stage, "p0", survivor)
    recovered("after it, until no KV is in use anywhere", time.monotonic() - died_s)


def test_a_refused_handshake_costs_a_local_prefill(guarded_fleet, tmp_path, recovered):
    """Another model string in the same transfer group by mistake: the decoder finds out and computes by itself."""
    stranger = "s0"
    entries = [entry for entry in guarded_fleet.broker_engines() if entry["id"] in {stranger, "d1"}]
    if not guarded_fleet.is_alive("d1"):
        guarded_fleet.restart("d1")
    with httpx2.Client(timeout=60, trust_env=False) as http:
        stage = Stage(guarded_fleet, RawProtocol(guarded_fleet, http), tmp_path)
        try:
            client = stage.client(stage.sdk(stage.broker(engines=entries, **HOLD_OFF)))
            talk = Conversation(stage, f"strangers {stranger}")
            with within(BUDGET_S):
                talk.ask(client)
                talk.ask(client)
            assert [(record.prefill_engine_id, record.error) for record in stage.turns.records] == [
                (stranger, ""),
                (None, ""),
            ]
            assert stage.turns.records[0].loss == "transfer_failed"
            recovered("a handshake is refused (another model string)", stage.turns.records[0].duration_ms / 1000)
            assert stage.turns.records[1].cached_tokens > 0
            assert guarded_fleet.is_alive("d1")
            check_empty(stage, stranger, "d1")
        finally:
            stage.close()

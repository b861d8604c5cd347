"""The whole path on real vLLM: one transfer per conversation, then only the decoder. Judged by vLLM's counters."""

import anyio
import pytest

from .leased import DECODERS, HOLD_OFF, Conversation, Meter, within

TURNS = 6
APIS = {"chat/completions": TURNS, "completions": 3, "responses": 3}
USAGE = {"stream_options": {"include_usage": True}}
CONVERSATIONS = 8
BUDGET_S = 100.0


def check_path(stage, meter, talk, *, turns):
    """One transfer, one prefill, a warm decoder; and vLLM, SDK and broker agree about it."""
    counted = meter.settled(requests=turns, transfers=1)
    records = stage.turns.records
    first, *tail = records
    assert counted.decoders.transfers == 1
    assert counted.decoders.failed_transfers == 0
    assert counted.decoders.requests == turns
    assert (counted.prefiller.requests, counted.prefiller.prompt_tokens) == (1, first.prompt_tokens)
    assert counted.decoders.prompt_transferred_tokens == first.prompt_tokens
    assert counted.decoders.prompt_cached_tokens > counted.decoders.prompt_computed_tokens
    assert [record.migrated for record in records] == [True] + [False] * (turns - 1)
    assert [record.turn for record in records] == list(range(1, turns + 1))
    assert {record.hops for record in tail} == {1}
    assert len({(record.lease_id, record.decoder_id, record.mode) for record in records}) == 1
    assert not any(record.error or record.loss for record in records)
    size = stage.fleet.engines["d0"].block_size_tokens
    for previous, record in zip(records, tail, strict=False):
        # All of the previous prompt but its unfinished block; the answer's own text may tokenise differently.
        assert record.cached_tokens >= previous.prompt_tokens // size * size - size
    assert len(set(talk.said)) == turns, "a model that always says the same proves nothing"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("api", "turns"), APIS.items(), ids=APIS)
def test_a_blocking_client_migrates_once_and_stays(stage, api, turns, stream):
    client = stage.client(stage.sdk(stage.broker()))
    talk = Conversation(stage, f"blocking {api} {stream}", api=api)
    meter = Meter(stage.fleet)
    extra = USAGE if stream and api != "responses" else {}
    with within(BUDGET_S):
        for _ in range(turns):
            talk.ask(client, stream=stream, **extra)
    check_path(stage, meter, talk, turns=turns)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("api", "turns"), APIS.items(), ids=APIS)
async def test_an_async_client_migrates_once_and_stays(stage, api, turns, stream):
    broker = await anyio.to_thread.run_sync(stage.broker)
    talk = Conversation(stage, f"async {api} {stream}", api=api)
    extra = USAGE if stream and api != "responses" else {}
    async with stage.sdk(broker) as conserve, conserve.async_openai_client(max_retries=0) as client:
        meter = Meter(stage.fleet)
        with anyio.fail_after(BUDGET_S):
            for _ in range(turns):
                await talk.aask(client, stream=stream, **extra)
    check_path(stage, meter, talk, turns=turns)


def test_headers_name_the_engines_of_each_turn(stage):
    client = stage.client(stage.sdk(stage.broker()))
    talk = Conversation(stage, "headers")
    shown = []
    for _ in range(2):
        answer = client.chat.completions.with_raw_response.create(**talk.body)
        talk.hear(answer.parse().choices[0].message.content)
        shown.append({name: value for name, value in answer.headers.items() if name.startswith("x-conserve-")})
    first, second = shown
    assert first.pop("x-conserve-prefiller") == "p0"
    assert first["x-conserve-decoder"] in {"d0", "d1"}
    assert (first.pop("x-conserve-turn"), second.pop("x-conserve-turn")) == ("1", "2")
    assert first == second
    assert first["x-conserve-mode"] == "migrate"


def test_an_unnamed_conversation_is_known_by_its_content(stage):
    client = stage.client(stage.sdk(stage.broker()))
    talk = Conversation(stage, "unnamed")
    meter = Meter(stage.fleet)
    for _ in range(3):
        talk.hear(client.chat.completions.create(**talk.body).choices[0].message.content)
    check_path(stage, meter, talk, turns=3)


def test_a_released_conversation_starts_again_with_a_migration(stage):
    broker = stage.broker()
    conserve = stage.sdk(broker)
    client = stage.client(conserve)
    talk = Conversation(stage, "released")
    talk.ask(client)
    before = stage.last
    assert conserve.release("released") == 1
    talk.ask(client)
    assert stage.last.migrated
    assert stage.last.lease_id != before.lease_id


def test_the_default_preset_computes_a_short_first_turn_where_it_stays(stage):
    client = stage.client(stage.sdk(stage.broker(preset="default")))
    talk = Conversation(stage, "short", words=60)
    meter = Meter(stage.fleet)
    for _ in range(3):
        talk.ask(client)
    counted = meter.settled(requests=3)
    assert (counted.decoders.transfers, counted.prefiller.requests) == (0, 0)
    assert {(record.mode, record.migrated, record.error, record.loss) for record in stage.turns.records} == {
        ("local", False, "", "")
    }


async def converse(stage, conserve, names, *, turns, words=150):
    """Hold all conversations at once."""
    talks = [Conversation(stage, name, words=words) for name in names]
    async with conserve.async_openai_client(max_retries=0) as client:

        async def hold(talk):
            for _ in range(turns):
                await talk.aask(client)

        with anyio.fail_after(BUDGET_S):
            async with anyio.create_task_group() as group:
                for talk in talks:
                    group.start_soon(hold, talk)
    return talks


async def test_eight_conversations_at_once_migrate_once_each_and_leave_nothing_behind(stage):
    broker = await anyio.to_thread.run_sync(stage.broker)
    meter = Meter(stage.fleet)
    expired = sum(stage.fleet.metrics(engine_id).expired_holds for engine_id in DECODERS)
    names = [f"crowd {number}" for number in range(CONVERSATIONS)]
    async with stage.sdk(broker) as conserve:
        await converse(stage, conserve, names, turns=3)

    counted = meter.settled(requests=3 * CONVERSATIONS, transfers=CONVERSATIONS)
    records = stage.turns.records
    assert counted.decoders.transfers == counted.prefiller.requests == CONVERSATIONS
    assert sum(record.migrated for record in records) == CONVERSATIONS
    assert not any(record.error or record.loss for record in records)
    for engine_id in ("p0", "d0", "d1"):  # the prefiller's were fetched, the decoders' holds end by themselves
        stage.raw.settled(engine_id, lambda now: now.kv_used_tokens == 0, budget_s=90.0)
    assert sum(stage.fleet.metrics(engine_id).expired_holds for engine_id in DECODERS) > expired


async def test_with_the_default_preset_sdk_broker_and_engines_count_the_same_migrations(stage):
    rules = {"preset": "default", "local_below_tokens": 256}  # prompts of 2048 tokens would take this CPU too long
    broker = await anyio.to_thread.run_sync(lambda: stage.broker(placement=rules, **HOLD_OFF))
    meter = Meter(stage.fleet)
    names = [f"mixed {number}" for number in range(6)]
    async with stage.sdk(broker) as conserve:
        await converse(stage, conserve, names, turns=2, words=400)
        migrated = [record for record in stage.turns.records if record.migrated]
        counted = meter.settled(requests=12, transfers=len(migrated))
        assert await anyio.to_thread.run_sync(conserve.flush)
    fleet_info = stage.raw.http.get(f"{broker.url}/v1/fleet").raise_for_status().json()
    assert counted.decoders.transfers == counted.prefiller.requests == len(migrated) == fleet_info["migrations_total"]
    first_turns = [record for record in stage.turns.records if record.turn == 1]
    assert [record.migrated for record in first_turns] == [record.mode == "migrate" for record in first_turns]
    assert not any(record.error or record.loss for record in stage.turns.records)

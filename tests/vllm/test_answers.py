"""Whatever an application asks for, a migrated first turn and its follow-up answer as one aggregated server does.

`Conversation` compares every text with the aggregated server; what is no text (log probabilities, several choices,
JSON, token ids) is compared here. First comes what vLLM itself can keep: an engine that contradicts itself proves
nothing about two.
"""

import json

import pytest

from .leased import HOLD_OFF, Conversation, Meter, within

BUDGET_S = 100.0
# A bound, because random weights may go on with one number until the answer is full.
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 999}, "unit": {"enum": ["lines", "words"]}},
    "required": ["count", "unit"],
    "additionalProperties": False,
}
FORMATS = {
    "json_schema": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}},
    "json_object": {"type": "json_object"},
}
PAST_A_BLOCK = (0, 1, 15, 16, 17, 31)


@pytest.fixture
def client(stage):
    return stage.client(stage.sdk(stage.broker(**HOLD_OFF)))


def check_migrated(stage, *, turns=1):
    assert not any(record.error or record.loss for record in stage.turns.records)
    assert [record.migrated for record in stage.turns.records] == [True] + [False] * (turns - 1)


# ---- what vLLM itself can keep -----------------------------------------------------------------------------------


def test_an_aggregated_server_says_the_same_cold_warm_and_in_company(raw):
    body = raw.body(raw.task("itself", words=300), max_tokens=32)
    cold = raw.said(raw.ask("a0", body))
    warm = raw.ask("a0", body)
    assert raw.cached(warm) > 0
    assert raw.said(warm) == cold
    prompts = [raw.prose("itself"), raw.prose("company one"), raw.prose("company two")]
    plain = {"model": raw.fleet.model, "temperature": 0, "max_tokens": 32}
    alone = [raw.said(raw.ask("a0", plain | {"prompt": prompt}, path="completions")) for prompt in prompts]
    together = raw.ask("a0", plain | {"prompt": prompts}, path="completions")
    assert [choice["text"] for choice in together["choices"]] == alone


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_seed_repeats_itself_on_an_aggregated_server(raw, path):
    asked = {"messages": raw.task("seeded")} if path == "chat/completions" else {"prompt": raw.prose("seeded")}
    body = {"model": raw.fleet.model, "temperature": 1, "seed": 7, "max_tokens": 24, **asked}
    first, again = (raw.said(raw.ask("a0", body, path=path)) for _ in range(2))
    assert first == again
    assert first != raw.said(raw.ask("a0", body | {"seed": 8}, path=path))


# ---- prompts that end just before, on and after a block's end ------------------------------------------------------


@pytest.mark.parametrize("past", PAST_A_BLOCK)
def test_a_prompt_may_end_anywhere_in_a_block(stage, fleet, client, past):
    size = fleet.engines["d0"].block_size_tokens
    ids = stage.raw.ids(f"boundary {past}", 6 * size + past)
    body = {"model": fleet.model, "temperature": 0, "max_tokens": size + 2}
    meter = Meter(fleet)
    for _ in range(2):
        with within(BUDGET_S):
            answer = client.completions.create(
                prompt=ids, extra_headers={"X-ConServe-Conversation": f"b{past}"}, **body
            )
        assert answer.usage.prompt_tokens == len(ids)
        reference = stage.raw.ask("a0", body | {"prompt": ids, "return_token_ids": True}, path="completions")
        assert answer.choices[0].text == reference["choices"][0]["text"]
        ids = [*ids, *reference["choices"][0]["token_ids"], *stage.raw.ids("and", 3)]
    check_migrated(stage, turns=2)
    moved = meter.settled(requests=2, transfers=1).decoders
    blocks = 6 + (past > 0)
    assert (moved.transfers, moved.transferred_bytes) == (1, blocks * size * fleet.kv_bytes_per_token)


@pytest.mark.parametrize("past", [0, 16])
def test_a_shared_prefix_moves_only_the_blocks_that_are_missing(stage, fleet, client, past):
    size = fleet.engines["d0"].block_size_tokens
    shared = stage.raw.ids(f"shared {past}", 8 * size + past)
    moved = []
    for number in range(4):
        meter = Meter(fleet)
        known = {record.decoder_id for record in stage.turns.records}
        prompt = [*shared, *stage.raw.ids(f"own {number} {past}", size + 5)]
        body = {"model": fleet.model, "temperature": 0, "max_tokens": 8, "prompt": prompt}
        with within(BUDGET_S):
            answer = client.completions.create(**body, extra_headers={"X-ConServe-Conversation": f"s{past} {number}"})
        assert answer.choices[0].text == stage.raw.said(stage.raw.ask("a0", body, path="completions"))
        counted = meter.settled(requests=1, transfers=1).decoders
        missing = -(-len(prompt) // size) - (8 if stage.last.decoder_id in known else 0)
        assert (counted.transfers, counted.transferred_bytes) == (1, missing * size * fleet.kv_bytes_per_token)
        moved.append(missing)
    assert min(moved) < 4 < max(moved), "some of both: a decoder's first, and one that knew the prefix"
    assert all(record.migrated and not record.loss for record in stage.turns.records)


@pytest.mark.parametrize("past", [15, 16, 17])
def test_a_chat_prompt_may_end_anywhere_in_a_block(stage, fleet, client, past):
    size = fleet.engines["d0"].block_size_tokens
    talk = Conversation(stage, f"chat boundary {past}")
    messages = talk.body["messages"]
    while (stage.raw.tokens(messages) - past) % size:
        messages[-1]["content"] += " file"
    for _ in range(6):
        talk.ask(client)
    check_migrated(stage, turns=6)
    assert stage.turns.records[0].prompt_tokens % size == past


# ---- what a request may ask for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", ["chat/completions", "completions"])
def test_stop_strings_stop_where_they_do_elsewhere(stage, client, api, stream):
    name = f"stop {api}"
    body = Conversation(stage, name, api=api).body | {"max_tokens": 32}
    whole = stage.raw.said(stage.raw.ask("a0", body, path=api))
    word = whole[len(whole) // 2 :][:4]
    talk = Conversation(stage, name, api=api, stop=[word])
    for turn in range(2):
        with within(BUDGET_S):
            text = talk.ask(client, stream=stream)
        assert word not in text
        assert turn or len(text) <= len(whole) // 2 + 4
    check_migrated(stage, turns=2)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_structured_answers_are_the_same_and_keep_their_form(stage, fleet, client, kind, stream):
    push = {str(fleet.eos_token_id): 100}  # random weights need not end an answer otherwise
    talk = Conversation(stage, f"{kind} {stream}", response_format=FORMATS[kind], logit_bias=push)
    talk.limit = 120
    for _ in range(2):
        with within(BUDGET_S):
            text = talk.ask(client, stream=stream)
        if kind == "json_object":
            assert text.startswith("{")  # inside its first string a random model goes on for ever
            continue
        told = json.loads(text)
        assert isinstance(told["count"], int)
        assert told["unit"] in {"lines", "words"}
    check_migrated(stage, turns=2)


def test_log_probabilities_are_those_of_the_aggregated_server(stage, client):
    talk = Conversation(stage, "logprobs", logprobs=True, top_logprobs=3)
    for _ in range(2):
        body = talk.body
        reference = stage.raw.ask("a0", body)["choices"][0]["logprobs"]["content"]
        with within(BUDGET_S):
            answer = client.chat.completions.create(**body, extra_headers={"X-ConServe-Conversation": "logprobs"})
        told = answer.choices[0].logprobs.content
        assert [entry.token for entry in told] == [entry["token"] for entry in reference]
        for mine, theirs in zip(told, reference, strict=True):
            assert mine.logprob == pytest.approx(theirs["logprob"], abs=1e-3)
            assert [top.token for top in mine.top_logprobs] == [top["token"] for top in theirs["top_logprobs"]]
        talk.hear(answer.choices[0].message.content)
    check_migrated(stage, turns=2)


def test_several_choices_are_those_of_the_aggregated_server_and_one_choice_moves(stage, fleet, client):
    """`n` above 1 computes its own prompt, because one transfer serves one sequence; with `n=1` the KV moves."""
    body = Conversation(stage, "choices").body | {"temperature": 1, "seed": 3}
    for n in (2, 1):
        meter = Meter(fleet)
        asked = {**body, "messages": stage.raw.task(f"choices {n}"), "n": n}
        with within(BUDGET_S):
            answer = client.chat.completions.create(**asked, extra_headers={"X-ConServe-Conversation": f"n{n}"})
        told = [choice.message.content for choice in answer.choices]
        assert told == [choice["message"]["content"] for choice in stage.raw.ask("a0", asked)["choices"]]
        assert len(set(told)) == n
        assert stage.last.migrated == (n == 1)
        moves = int(n == 1)
        assert meter.settled(requests=1, transfers=moves).decoders.transfers == moves
    assert not any(record.error for record in stage.turns.records)


@pytest.mark.parametrize("api", ["chat/completions", "completions", "responses"])
def test_a_prompt_and_its_answer_may_fill_the_context_to_the_last_token(stage, fleet, client, api):
    longest = fleet.engines["d0"].max_model_len_tokens
    words = 2_000 * (longest - 300) // stage.raw.tokens(stage.raw.task(f"limit {api}", words=2_000))
    talk = Conversation(stage, f"limit {api}", api=api, words=words)
    body = talk.body
    used = stage.raw.ask("a0", body, path=api)["usage"]
    room = longest - used.get("prompt_tokens", used.get("input_tokens"))
    assert 16 < room < longest // 8, "the prompt leaves room, and not much"
    talk.limit = room
    with within(BUDGET_S):
        talk.ask(client)
    check_migrated(stage)
    assert stage.last.prompt_tokens + stage.last.completion_tokens <= longest

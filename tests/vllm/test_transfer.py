"""The paper's path on real vLLM: prefill once, move once, stay. Judged by vLLM's own counters and by its answers."""

import json

import pytest

TURNS = 4


def blocks(tokens, size):
    return -(-tokens // size)


def test_first_turn_moves_its_kv_once_and_no_more_than_its_blocks(raw, fleet):
    before = fleet.metrics("d0"), fleet.metrics("p0")
    answer = raw.migrate(raw.body(raw.task("once")))
    tokens = answer["usage"]["prompt_tokens"]

    decoder = raw.settled("d0", lambda now: now.since(before[0]).transfers >= 1).since(before[0])
    prefiller = raw.settled("p0", lambda now: now.since(before[1]).requests >= 1).since(before[1])

    size = fleet.engines["d0"].block_size_tokens
    assert decoder.transfers == 1
    assert decoder.transferred_bytes == blocks(tokens, size) * size * fleet.kv_bytes_per_token
    assert (decoder.prompt_transferred_tokens, decoder.prompt_computed_tokens) == (tokens, 0)
    assert decoder.external_hit_tokens == tokens
    assert (prefiller.prompt_computed_tokens, prefiller.generation_tokens) == (tokens, 1)


def test_follow_ups_stay_on_the_decoder_and_hit_its_cache(raw, fleet):
    before = fleet.metrics("d0"), fleet.metrics("p0")
    messages = raw.task("tail")
    answer = raw.migrate(raw.body(messages))
    for turn in range(2, TURNS + 1):
        history = answer["usage"]["prompt_tokens"]
        messages += [{"role": "assistant", "content": raw.said(answer)}, {"role": "user", "content": f"turn {turn}"}]
        answer = raw.ask("d0", raw.body(messages))
        size = fleet.engines["d0"].block_size_tokens
        # All of the last prompt but its unfinished block; the answer's own text may tokenise differently.
        assert raw.cached(answer) >= history // size * size

    decoder = raw.settled("d0", lambda now: now.since(before[0]).requests >= TURNS).since(before[0])
    prefiller = fleet.metrics("p0").since(before[1])
    assert decoder.transfers == 1
    assert prefiller.requests == 1
    assert decoder.failed_transfers == 0
    assert decoder.prompt_cached_tokens > decoder.prompt_computed_tokens


@pytest.mark.parametrize("name", ["ada", "bob", "eve"])
def test_greedy_answers_equal_those_of_one_aggregated_server(raw, name):
    messages = raw.task(f"same {name}")
    answers = []
    for turn in range(1, TURNS + 1):
        body = raw.body(messages, max_tokens=24)
        answer = raw.migrate(body) if turn == 1 else raw.ask("d0", body)
        assert raw.said(answer) == raw.said(raw.ask("a0", body)), f"turn {turn} differs from the aggregated server"
        answers.append(raw.said(answer))
        messages += [{"role": "assistant", "content": raw.said(answer)}, {"role": "user", "content": f"go on {turn}"}]
    assert len(set(answers)) == TURNS, "a model that always says the same proves nothing"


@pytest.mark.parametrize("path", ["completions", "responses"])
def test_the_other_two_apis_migrate_too(raw, fleet, path):
    prompt = {"prompt": raw.prose(path)} if path == "completions" else {"input": raw.prose(path)}
    limit = {"max_output_tokens": 16} if path == "responses" else {"max_tokens": 16}
    body = {"model": fleet.model, "temperature": 0, **prompt, **limit}
    before = fleet.metrics("d1")

    answer = raw.migrate(body, decoder="d1", path=path)

    moved = raw.settled("d1", lambda now: now.since(before).transfers >= 1).since(before)
    assert (moved.transfers, moved.prompt_computed_tokens) == (1, 0)
    assert raw.said(answer) == raw.said(raw.ask("a0", body, path=path))


def test_a_streamed_decode_leg_says_the_same(raw):
    body = raw.body(raw.task("stream"), max_tokens=24)
    params = raw.prefill(body)
    leg = body | {"kv_transfer_params": params, "stream": True, "stream_options": {"include_usage": True}}
    text, usage = "", None
    with raw.http.stream("POST", f"{raw.fleet.engines['d1'].api}/chat/completions", json=leg) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                usage = event.get("usage") or usage
    assert text == raw.said(raw.ask("a0", body))
    assert usage["prompt_tokens"] == len(params["prompt_token_ids"])


def test_only_missing_blocks_move_when_the_decoder_knows_the_prefix(raw, fleet):
    system = raw.task("shared", words=400)
    first = raw.migrate(raw.body([*system, {"role": "user", "content": "first question"}]), decoder="d1")
    before = fleet.metrics("d1")

    second = raw.migrate(raw.body([*system, {"role": "user", "content": "second, another one"}]), decoder="d1")

    moved = raw.settled("d1", lambda now: now.since(before).transfers >= 1).since(before)
    size = fleet.engines["d1"].block_size_tokens
    assert moved.transfers == 1
    assert moved.transferred_bytes <= 2 * size * fleet.kv_bytes_per_token
    assert moved.prompt_cached_tokens > 0.8 * second["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_tokens"] > 400

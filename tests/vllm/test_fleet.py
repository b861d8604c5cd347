"""The fleet itself: what it says about its engines is what the engines say about themselves."""


def test_engines_are_what_was_asked_for(fleet):
    assert list(fleet.engines) == ["p0", "d0", "d1", "a0"]
    assert [engine.role for engine in fleet.engines.values()] == ["prefiller", "decoder", "decoder", "both"]
    for engine in fleet.engines.values():
        assert engine.kv_capacity_tokens == fleet.options.kv_cache_tokens
        assert engine.block_size_tokens == 32


def test_the_model_has_the_same_name_and_length_everywhere(raw, fleet):
    for engine in fleet.engines.values():
        (card,) = raw.http.get(f"{engine.api}/models").json()["data"]
        assert (card["id"], card["max_model_len"]) == (fleet.model, engine.max_model_len_tokens)


def test_only_engines_with_a_connector_are_listed_for_a_broker(fleet):
    assert [entry["id"] for entry in fleet.broker_engines()] == ["p0", "d0", "d1"]
    reference = fleet.broker_engines(references=True)[-1]
    assert (reference["connector"], reference["transfer_group"]) == (None, "")


def test_counters_count(raw, fleet):
    before = fleet.metrics("a0")
    answer = raw.ask("a0", raw.body(raw.task("count"), max_tokens=5, ignore_eos=True))
    counted = raw.settled("a0", lambda now: now.since(before).requests >= 1).since(before)
    assert (counted.requests, counted.generation_tokens) == (1, 5)
    assert counted.prompt_tokens == answer["usage"]["prompt_tokens"]
    assert counted.prompt_computed_tokens + counted.prompt_cached_tokens == counted.prompt_tokens
    assert "conserve-tiny" in fleet.logs("a0")

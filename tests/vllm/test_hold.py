"""vLLM keeps a conversation's KV between turns when asked to: `do_remote_decode` on a decoder's request.

That holds end by themselves is seen in `test_end_to_end.py`, where eight conversations leave nothing behind.
"""

HELD = {"do_remote_decode": True}
QUESTION = {"role": "user", "content": "and now"}


def test_a_held_turn_survives_pressure_that_evicts_the_others(raw, fleet):
    held, loose = raw.task("held", words=600), raw.task("loose", words=600)
    held_params = raw.prefill(raw.body(held)) | HELD
    answer = raw.ask("d0", raw.body(held) | {"kv_transfer_params": held_params})
    held_tokens = answer["usage"]["prompt_tokens"]
    held_usage = raw.settled("d0", lambda now: now.running == 0).kv_used_tokens
    other = raw.migrate(raw.body(loose))

    raw.fill_cache("d0", tag="hold")

    follow_up = [*held, {"role": "assistant", "content": raw.said(answer)}, QUESTION]
    cached = raw.cached(raw.ask("d0", raw.body(follow_up)))
    lost = [*loose, {"role": "assistant", "content": raw.said(other)}, QUESTION]
    assert cached >= held_tokens // 32 * 32
    assert raw.cached(raw.ask("d0", raw.body(lost))) == 0
    assert held_usage >= held_tokens // 32 * 32, "a held conversation shows in the usage of the cache"


def test_a_follow_up_can_be_held_as_well_and_says_the_same(raw):
    messages = raw.task("renewed", words=200)
    answer = raw.ask("d1", raw.body(messages) | {"kv_transfer_params": raw.prefill(raw.body(messages)) | HELD})
    for turn in range(2, 4):
        messages += [{"role": "assistant", "content": raw.said(answer)}, {"role": "user", "content": f"next {turn}"}]
        answer = raw.ask("d1", raw.body(messages) | {"kv_transfer_params": HELD})
        assert raw.said(answer) == raw.said(raw.ask("a0", raw.body(messages)))
        assert raw.cached(answer) > 0
    assert raw.settled("d1", lambda now: now.running == 0).kv_used_tokens > 0

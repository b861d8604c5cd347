"""What wrong `kv_transfer_params` do to vLLM: why the SDK makes them itself, uses them once, and never from outside.

These are facts about vLLM 0.32, not wishes: a test that fails here after an upgrade is good news, and a rule of the
SDK may go. Each test restarts the engine that it hurt.
"""

import httpx2
import pytest

DEATH_BUDGET_S = 30.0
HANG_BUDGET_S = 8.0
"""Longer than an answer of the tiny model takes; the request that is watched waits for ever."""


@pytest.fixture
def victim(fleet):
    """A decoder that may be hurt."""
    yield "d1"
    fleet.restart("d1")


def send(raw, engine_id, body):
    """Send what may kill the engine; whatever comes back is not an answer to rely on."""
    try:
        return raw.post(engine_id, body).status_code
    except httpx2.TransportError:
        return None


def test_params_used_twice_answer_200_with_the_wrong_text(raw, victim):
    # Rule: each set of params is used once. The first read frees the prefiller's blocks; another prompt takes them.
    body = raw.body(raw.task("replay", words=900), max_tokens=24)
    truth = raw.said(raw.ask("a0", body))
    params = raw.prefill(body)
    assert raw.said(raw.ask("d0", body | {"kv_transfer_params": params})) == truth
    raw.fill_cache("p0", tag="overwrite")

    replayed = raw.ask(victim, body | {"kv_transfer_params": params})

    assert raw.said(replayed) != truth
    # Rule: never on a retry either. The wrong blocks now stand in the decoder's cache under the right prompt's hash.
    poisoned = raw.ask(victim, body)
    assert raw.cached(poisoned) > 0
    assert raw.said(poisoned) != truth


def test_a_decode_leg_longer_than_its_prefill_kills_the_decoder(raw, fleet, victim):
    # Rule: both legs carry the same prompt; `prompt_token_ids` in the params make sure of it.
    params = raw.prefill(raw.body(raw.task("longer", words=100)))
    del params["prompt_token_ids"]

    status = send(raw, victim, raw.body(raw.task("longer", words=400)) | {"kv_transfer_params": params})

    assert status != 200
    assert fleet.wait_dead(victim, timeout_s=DEATH_BUDGET_S)


def test_prompt_token_ids_in_the_params_win_over_other_messages(raw):
    # The stock cure for the case above: the decoder neither templates nor tokenises.
    body = raw.body(raw.task("cure", words=100), max_tokens=24)
    other = raw.body(raw.task("cure", words=400), max_tokens=24)

    answer = raw.ask("d0", other | {"kv_transfer_params": raw.prefill(body)})

    assert raw.said(answer) == raw.said(raw.ask("a0", body))


def test_params_made_up_by_an_application_kill_the_decoder(raw, fleet, victim):
    # Rule: the SDK strips `kv_transfer_params` that an application sends.
    status = send(raw, victim, raw.body(raw.task("made up")) | {"kv_transfer_params": {"do_remote_prefill": True}})

    assert status != 200
    assert fleet.wait_dead(victim, timeout_s=DEATH_BUDGET_S)


def test_a_prefill_leg_must_override_both_token_limits(raw):
    # Rule: `max_completion_tokens` wins over `max_tokens`, so a prefill leg sets whichever the application used.
    messages = raw.task("limits", words=50)
    body = {"model": raw.fleet.model, "messages": messages, "max_tokens": 1, "max_completion_tokens": 9}
    answer = raw.ask("a0", body | {"ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize(
    ("field", "value"),
    [("stream_options", {"include_usage": True}), ("min_tokens", 5), ("n", 2)],
    ids=str,
)
def test_fields_that_a_prefill_leg_must_drop(raw, field, value):
    leg = raw.body(raw.task("drop", words=50), max_tokens=1) | {"kv_transfer_params": {"do_remote_decode": True}}
    assert raw.post("p0", leg | {field: value}).status_code == 400


def test_a_streamed_prefill_leg_returns_no_params(raw):
    # Rule: the prefill leg never streams.
    leg = raw.body(raw.task("mute", words=50), max_tokens=1, stream=True)
    with raw.http.stream(
        "POST",
        f"{raw.fleet.engines['p0'].api}/chat/completions",
        json=leg | {"kv_transfer_params": {"do_remote_decode": True}},
    ) as answer:
        assert answer.status_code == 200
        assert "remote_block_ids" not in "".join(answer.iter_lines())


@pytest.mark.parametrize("kept", [True, False], ids=["with", "without"])
def test_a_held_pull_that_fails_waits_for_ever_for_the_tokens_it_was_promised(raw, fleet, victim, kept):
    # Rule: a request that is both pulled and held goes without `remote_num_tokens`. When the client has left, the
    # request is gone, but not its blocks: they stay in use until the engine restarts.
    raw.migrate(raw.body(raw.task(f"met {kept}")), decoder=victim)  # a first handshake with the dead would take 5 s
    body = raw.body(raw.task(f"held pull {kept}"))
    params = raw.prefill(body) | {"do_remote_decode": True}
    if not kept:
        del params["remote_num_tokens"]
    fleet.kill("p0")
    try:
        answer = raw.http.post(
            f"{fleet.engines[victim].api}/chat/completions",
            json=body | {"kv_transfer_params": params},
            timeout=HANG_BUDGET_S if kept else DEATH_BUDGET_S,
        )
    except httpx2.ReadTimeout:
        answer = None
    finally:
        fleet.restart("p0")
    assert (answer is None) == kept
    assert answer is None or raw.said(answer.json()) == raw.said(raw.ask("a0", body))
    raw.ask(victim, raw.body(raw.task(f"others {kept}")))  # other requests are well

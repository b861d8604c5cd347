"""Lost engines: time may be lost, never an answer. Budgets are those of a loaded two-core machine."""

import time

import httpx2
import pytest

# A decoder that has never met the dead prefiller waits 5 s for its handshake before it computes by itself.
FALLBACK_BUDGET_S = 30.0


@pytest.fixture
def prefiller(fleet):
    yield "p0"
    fleet.restart("p0")


@pytest.mark.parametrize("met", [True, False], ids=["connected", "never-met"])
def test_prefiller_killed_between_the_legs_costs_a_local_prefill(raw, fleet, prefiller, met):
    if met:
        raw.migrate(raw.body(raw.task("meet")))
    else:
        fleet.restart("d0")
    body = raw.body(raw.task(f"orphan {met}"), max_tokens=24)
    params = raw.prefill(body)
    before = fleet.metrics("d0")
    fleet.kill(prefiller)

    started_at = time.monotonic()
    answer = raw.ask("d0", body | {"kv_transfer_params": params})

    assert time.monotonic() - started_at < FALLBACK_BUDGET_S
    assert raw.said(answer) == raw.said(raw.ask("a0", body))
    counted = raw.settled("d0", lambda now: now.since(before).requests >= 1).since(before)
    assert counted.prompt_computed_tokens == answer["usage"]["prompt_tokens"]
    assert counted.transfers == 0


def test_a_restarted_prefiller_serves_again_without_telling_the_decoders(raw, fleet):
    raw.migrate(raw.body(raw.task("before")))
    fleet.restart("p0")
    before = fleet.metrics("d0")
    body = raw.body(raw.task("after"))

    answer = raw.migrate(body)

    assert raw.said(answer) == raw.said(raw.ask("a0", body))
    assert raw.settled("d0", lambda now: now.since(before).transfers >= 1).since(before).failed_transfers == 0


def test_a_restarted_decoder_has_an_empty_cache_and_the_right_answer(raw, fleet):
    messages = raw.task("amnesia")
    answer = raw.migrate(raw.body(messages))
    messages += [{"role": "assistant", "content": raw.said(answer)}, {"role": "user", "content": "go on"}]
    pid = fleet.engines["d0"].pid
    fleet.kill("d0")
    with pytest.raises(httpx2.TransportError):
        raw.post("d0", raw.body(messages))
    assert not fleet.is_alive("d0")

    fleet.restart("d0")

    follow_up = raw.ask("d0", raw.body(messages))
    assert fleet.engines["d0"].pid != pid
    assert raw.cached(follow_up) == 0
    assert raw.said(follow_up) == raw.said(raw.ask("a0", raw.body(messages)))


def test_params_of_a_prefiller_that_restarted_meanwhile_cost_a_local_prefill(raw, fleet):
    body = raw.body(raw.task("stale"), max_tokens=24)
    params = raw.prefill(body)
    fleet.restart("p0")

    answer = raw.ask("d1", body | {"kv_transfer_params": params})

    assert raw.said(answer) == raw.said(raw.ask("a0", body))


def test_an_engine_without_a_connector_gives_no_params(raw):
    leg = raw.body(raw.task("plain"), max_tokens=1) | {"kv_transfer_params": {"do_remote_decode": True}}
    assert raw.ask("a0", leg)["kv_transfer_params"] is None


def test_a_prompt_longer_than_the_model_is_refused_in_words(raw, fleet):
    answer = raw.post("p0", raw.body(raw.task("long", words=5_000), max_tokens=1))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert str(fleet.engines["p0"].max_model_len_tokens) in error["message"]
    assert error["param"] == "input_tokens"
    assert fleet.is_alive("p0")

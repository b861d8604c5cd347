"""The crash and corruption table of `kv_transfer_params`, fired at a guarded decoder: it lives and says the truth.

`test_dangers.py` fires the same at decoders without a guard, which die or lie; the first test here does both.
"""

import contextlib
import json
from contextlib import closing

import httpx2
import pytest

from .guarded import HOLD, PREFILL
from .leased import Conversation, Network, Stage
from .raw import RawProtocol

DEATH_BUDGET_S = 60.0


def test_made_up_params_kill_the_decoder_without_a_guard_and_not_the_one_with(leased, guarded_fleet):
    body = leased.body(leased.task("made up, twice"))
    leased.refused(body, {"do_remote_prefill": True}, code="bad_transfer_params")
    with contextlib.suppress(httpx2.TransportError):  # it may die before it could say so
        leased.post("d1", body | {"kv_transfer_params": {"do_remote_prefill": True}})
    assert guarded_fleet.wait_dead("d1", timeout_s=DEATH_BUDGET_S)
    leased.check_well(body)


def test_a_transfer_passes_and_is_one(leased, guarded_fleet):
    body = leased.body(leased.task("through two guards"), max_tokens=24)
    before = guarded_fleet.metrics("d0")
    params = leased.prefill(body)
    answer = leased.ask("d0", body | {"kv_transfer_params": params | HOLD})
    assert leased.said(answer) == leased.said(leased.ask("a0", body))
    moved = leased.settled("d0", lambda now: now.since(before).transfers == 1).since(before)
    assert moved.prompt_transferred_tokens == len(params["prompt_token_ids"])


@pytest.mark.parametrize("path", ["completions", "responses"])
def test_the_other_routes_pass_too(leased, guarded_fleet, path):
    prompt = leased.prose(f"guarded {path}", 120)
    body = {"model": guarded_fleet.model, "temperature": 0}
    body |= {"input": prompt, "max_output_tokens": 16} if path == "responses" else {"prompt": prompt, "max_tokens": 16}
    before = guarded_fleet.metrics("d0")
    answer = leased.ask("d0", body | {"kv_transfer_params": leased.prefill(body, path=path)}, path=path)
    assert leased.said(answer) == leased.said(leased.ask("a0", body, path=path))
    assert leased.settled("d0", lambda now: now.since(before).transfers == 1)


def test_a_second_use_is_refused_where_vllm_would_answer_wrong_text(leased):
    body = leased.body(leased.task("guarded replay", words=900), max_tokens=24)
    params = leased.prefill(body)
    leased.ask("d0", body | {"kv_transfer_params": params})
    leased.refused(body, params, code="transfer_used")
    leased.check_well(body)


class Twice(Network):
    """A way to the engines on which somebody repeats what makes them pull KV."""

    def handle_request(self, request):
        if json.loads(request.read()).get("kv_transfer_params", {}).get("do_remote_prefill"):
            twin = httpx2.Request(request.method, request.url, headers=request.headers, content=request.content)
            with httpx2.Client(timeout=60, trust_env=False) as http:
                http.send(twin).raise_for_status()
        return super().handle_request(request)


def test_kv_that_was_pulled_already_costs_the_sdk_a_local_prefill(leased, guarded_fleet, tmp_path):
    stage = Stage(guarded_fleet, RawProtocol(guarded_fleet, leased.http), tmp_path)
    one = [engine for engine in guarded_fleet.broker_engines() if engine["id"] in {"p0", "d0"}]
    with closing(stage), Twice(guarded_fleet) as network:
        client = stage.client(stage.sdk(stage.broker(engines=one), engine_transport=network))
        talk = Conversation(stage, "pulled before", words=300)
        talk.ask(client)
        assert (stage.last.error, stage.last.loss, stage.last.migrated) == ("", "transfer_failed", False)
        talk.ask(client)
        assert (stage.last.error, stage.last.loss, stage.last.hops) == ("", "", 1)


def test_a_longer_prompt_is_refused_where_vllm_would_end(leased):
    params = leased.prefill(leased.body(leased.task("guarded longer", words=100)))
    longer = leased.body(leased.task("guarded longer", words=400))
    leased.refused(longer, params, code="prompt_differs")
    without_ids = {key: value for key, value in params.items() if key != "prompt_token_ids"}
    leased.refused(longer, without_ids, code="prompt_differs")
    leased.check_well(longer)


CHANGES = {
    "empty blocks": ({"remote_block_ids": []}, "bad_transfer_params"),
    "no request id": ({"remote_request_id": None}, "bad_transfer_params"),
    "too few blocks": ({"remote_block_ids": [[1]]}, "transfer_altered"),
    "blocks out of range": ({"remote_block_ids": [[10**6, 10**6 + 1]]}, "transfer_altered"),
    "another host": ({"remote_host": "127.0.0.2"}, "transfer_altered"),
    "wrong port": ({"remote_port": 9}, "transfer_altered"),
    "wrong parallelism": ({"tp_size": 2}, "transfer_altered"),
    "no stamp": ({"conserve_stamp": None}, "transfer_unstamped"),
}


@pytest.mark.parametrize(("change", "code"), CHANGES.values(), ids=CHANGES)
def test_changed_params_are_refused(leased, change, code):
    body = leased.body(leased.task(f"changed {code} {sorted(change)}", words=60))
    leased.refused(body, leased.prefill(body) | change, code=code)
    leased.check_well(body)


def test_another_conversations_params_are_refused_where_vllm_would_answer_garbage(leased):
    body = leased.body(leased.task("mine", words=100))
    leased.refused(body, leased.prefill(leased.body(leased.task("not mine", words=100))), code="prompt_differs")
    leased.check_well(body)


def test_a_lease_is_of_one_life_of_one_engine_and_ends(leased):
    body = leased.body(leased.task("leases", words=60))
    params = leased.prefill(body)
    for wrong, code in [
        (leased.token(decoder="d1"), "lease_elsewhere"),
        (leased.token(life="started-1.00"), "engine_restarted"),
        (leased.token(ends_in_ms=-60_000), "lease_expired"),
        ("nonsense", "lease_invalid"),
    ]:
        leased.lease_token = wrong
        leased.refused(body, params, code=code)
    leased.check_well(body)  # plain requests need no lease


def test_a_prefiller_keeps_nothing_for_strangers(leased):
    leased.lease_token = "nonsense"
    leased.refused(leased.body(leased.task("stranger")), PREFILL, code="lease_invalid", engine_id="p0")


def test_a_hold_without_a_lease_is_a_plain_turn(leased):
    leased.lease_token = ""
    body = leased.body(leased.task("holding", words=60))
    answer = leased.post("d0", body | {"kv_transfer_params": HOLD})
    assert answer.status_code == 200
    assert answer.headers["x-conserve-guard"].startswith("hold-stripped")
    assert leased.said(answer.json()) == leased.said(leased.ask("a0", body))


def test_the_guard_tells_what_vllm_does_not(leased, guarded_fleet):
    told = leased.identity("d0")
    engine = guarded_fleet.engines["d0"]
    started = next(
        float(line.split()[1])
        for line in leased.http.get(f"{engine.url}/metrics").text.splitlines()
        if line.startswith("process_start_time_seconds ")
    )
    assert told["incarnation"] == f"started-{started:.2f}", "as a broker's scrape derives it"
    assert (told["engine_id"], told["role"], told["connector"]) == ("d0", "decoder", "NixlConnector")
    assert (told["kv_load_failure_policy"], told["kv_lease_duration_ms"]) == ("recompute", 30_000)
    assert (told["models"], told["block_size_tokens"]) == ([guarded_fleet.model], engine.block_size_tokens)
    assert (told["prefix_caching"], told["prompt_tokens_details"]) == (True, True)
    assert told["max_model_len_tokens"] == 4_096
    assert told["side_channel"]["host"] == "127.0.0.1"
    params = leased.prefill(leased.body(leased.task("who", words=60)))
    prefiller = leased.identity("p0")
    assert prefiller["role"] == "prefiller"
    assert (prefiller["kv_engine_id"], prefiller["side_channel"]["port"]) == (
        params["remote_engine_id"],
        params["remote_port"],
    )


def test_the_sdk_passes_through_guards_unchanged(guarded_fleet, leased, tmp_path):
    """A first turn that is moved, follow-ups that are held, and a failover when the decoder dies."""
    raw = RawProtocol(guarded_fleet, leased.http)
    stage = Stage(guarded_fleet, raw, tmp_path)
    try:
        if guarded_fleet.is_alive("d1"):
            guarded_fleet.kill("d1")
        client = stage.client(stage.sdk(stage.broker(engines=guarded_fleet.broker_engines(), ready=2)))
        talk = Conversation(stage, "guarded talk")
        for _ in range(3):
            talk.ask(client)
        assert [(turn.migrated, turn.loss, turn.error) for turn in stage.turns.records] == [
            (True, "", ""),
            (False, "", ""),
            (False, "", ""),
        ]
        assert stage.turns.records[-1].cached_tokens > 0
        counts = leased.identity("d0")["guard"]
        assert counts["pull"] >= 1
        assert counts["hold"] >= 2
        guarded_fleet.restart("d1")
        guarded_fleet.kill("d0")
        talk.ask(client)
        assert (stage.last.decoder_id, stage.last.error) == ("d1", "")
    finally:
        stage.close()

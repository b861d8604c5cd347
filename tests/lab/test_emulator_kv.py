"""NIXL's protocol between prefiller and decoder: what works, what is refused, what fails."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from conserve_lab.emulator import EmulatedFleet, default_fleet, fleet_of

MESSAGES = [{"role": "system", "content": "word " * 200}, {"role": "user", "content": "hello"}]
DEADLINE_S = 30.0


def chat(fleet: EmulatedFleet, http: httpx2.Client, engine: str, **body: Any) -> httpx2.Response:
    document = {"model": fleet.engine(engine).model, "messages": MESSAGES, **body}
    return http.post(fleet.engine(engine).url + "/v1/chat/completions", json=document)


def prefill(fleet: EmulatedFleet, http: httpx2.Client, engine: str = "p0", **body: Any) -> Any:
    body = {"max_tokens": 1, "return_token_ids": True, **body}
    answer = chat(fleet, http, engine, kv_transfer_params={"do_remote_decode": True}, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def counters(fleet: EmulatedFleet, http: httpx2.Client, engine: str) -> dict[str, float]:
    """Return samples by name, or by name and last label where a metric has one of its own."""
    found: dict[str, float] = {}
    for line in http.get(fleet.engine(engine).url + "/metrics").text.splitlines():
        if line.startswith("#") or "_bucket" in line:
            continue
        name, value = line.rsplit(" ", 1)
        base, _, labels = name.partition("{")
        for key in ("source=", "finished_reason=", "reason="):
            if key in labels:
                base += "/" + labels.split(key, 1)[1].split('"')[1]
                break
        found[base] = float(value)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


# ---- what works ----------------------------------------------------------------------------------------------


def test_prefill_then_decode_equals_one_engine(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    first = prefill(fleet, http)
    params = first["kv_transfer_params"]
    assert set(params) == {
        "do_remote_prefill",
        "do_remote_decode",
        "remote_block_ids",
        "remote_engine_id",
        "remote_request_id",
        "remote_host",
        "remote_port",
        "tp_size",
        "dcp_size",
        "pp_size",
        "remote_num_tokens",
        "remote_blocks_expiry_time",
        "transfer_mode",
        "remote_prefill_cached_tokens",
    }
    prompt_tokens = first["usage"]["prompt_tokens"]
    assert params["remote_num_tokens"] == prompt_tokens
    assert len(params["remote_block_ids"][0]) == -(-prompt_tokens // 16)
    assert (params["remote_blocks_expiry_time"], params["transfer_mode"]) == (None, "pull")
    assert fleet.engine("p0").held_requests == 1

    decoded = chat(fleet, http, "d0", kv_transfer_params=params).json()
    alone = chat(fleet, http, "d1").json()
    assert decoded["choices"] == alone["choices"]
    assert decoded["kv_transfer_params"] is None
    assert (fleet.engine("p0").held_requests, fleet.engine("p0").kv_used_blocks) == (0, 0)

    after = counters(fleet, http, "d0")
    assert after["vllm:prompt_tokens_by_source_total/external_kv_transfer"] == prompt_tokens
    assert after["vllm:prompt_tokens_by_source_total/local_compute"] == 0
    assert after["vllm:external_prefix_cache_hits_total"] == prompt_tokens
    assert after["vllm:nixl_xfer_time_seconds_count"] == 1
    blocks = -(-prompt_tokens // 16)
    assert after["vllm:nixl_bytes_transferred_sum"] == blocks * 16 * 131_072
    assert after["vllm:nixl_num_descriptors_sum"] == blocks
    assert counters(fleet, http, "p0")["vllm:prompt_tokens_by_source_total/local_compute"] == prompt_tokens


def test_only_missing_blocks_move(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    warm = chat(fleet, http, "d0").json()
    follow = [*MESSAGES, warm["choices"][0]["message"], {"role": "user", "content": "and then? " * 30}]
    first = prefill(fleet, http, messages=follow)
    decoded = chat(fleet, http, "d0", messages=follow, kv_transfer_params=first["kv_transfer_params"]).json()
    cached = (warm["usage"]["total_tokens"] - 1) // 16 * 16
    moved = decoded["usage"]["prompt_tokens"] - cached
    after = counters(fleet, http, "d0")
    assert after["vllm:prompt_tokens_by_source_total/external_kv_transfer"] == moved
    assert after["vllm:prompt_tokens_by_source_total/local_cache_hit"] == cached
    assert after["vllm:nixl_bytes_transferred_sum"] == -(-moved // 16) * 16 * 131_072


def test_forwarded_prompt_token_ids_replace_the_messages(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    first = prefill(fleet, http)
    params = {**first["kv_transfer_params"], "prompt_token_ids": first["prompt_token_ids"]}
    wrong = [{"role": "user", "content": "something else " * 500}]
    decoded = chat(fleet, http, "d0", messages=wrong, kv_transfer_params=params).json()
    assert decoded["choices"] == chat(fleet, http, "d1").json()["choices"]


def test_a_decoder_reports_the_prefillers_cache_hits(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    chat(fleet, http, "p0")
    first = prefill(fleet, http)
    cached = first["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    decoded = chat(fleet, http, "d0", kv_transfer_params=first["kv_transfer_params"]).json()
    assert decoded["usage"]["prompt_tokens_details"]["cached_tokens"] == cached


def test_a_decoder_holds_a_turn_on_demand_and_the_lease_ends_by_itself(http: httpx2.Client) -> None:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=1, time_scale=0, kv_lease_ms=300)) as fleet:
        params = prefill(fleet, http)["kv_transfer_params"]
        held = chat(fleet, http, "d0", kv_transfer_params={**params, "do_remote_decode": True}).json()
        own = held["kv_transfer_params"]
        assert own["remote_engine_id"] == fleet.engine("d0").nixl_engine_id
        assert own["remote_num_tokens"] == held["usage"]["total_tokens"] - 1
        wait_until(lambda: fleet.engine("d0").kv_used_blocks == 0)
        assert counters(fleet, http, "d0")["vllm:nixl_num_kv_expired_reqs_total"] == 1


def test_held_blocks_show_in_usage_and_survive_pressure(http: httpx2.Client) -> None:
    small = default_fleet(prefillers=0, decoders=1, time_scale=0, max_model_len=1024, kv_cache_tokens=1024)
    others = [[{"role": "user", "content": word * 400}] for word in ("other ", "third ")]
    for hold, expected in ((True, True), (False, False)):
        with EmulatedFleet(small) as fleet:
            params = {"do_remote_decode": True} if hold else None
            first = chat(fleet, http, "d0", kv_transfer_params=params).json()
            usage = counters(fleet, http, "d0")["vllm:kv_cache_usage_perc"]
            assert (usage > 0.2) == expected
            for other in others:
                assert chat(fleet, http, "d0", messages=other).status_code == 200
            follow = [*MESSAGES, first["choices"][0]["message"], {"role": "user", "content": "more"}]
            again = chat(fleet, http, "d0", messages=follow).json()
            assert (again["usage"]["prompt_tokens_details"]["cached_tokens"] > 256) == expected


def test_streams_never_carry_params_but_responses_do_at_their_end(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    hold = {"do_remote_decode": True}
    stream = chat(fleet, http, "p0", stream=True, max_tokens=1, kv_transfer_params=hold)
    assert "kv_transfer_params" not in stream.text
    url = fleet.engine("p0").url
    body = {"model": "emulated", "kv_transfer_params": hold}
    whole = http.post(url + "/v1/completions", json={**body, "prompt": "x", "max_tokens": 1}).json()
    assert whole["kv_transfer_params"]["do_remote_prefill"]
    streamed = http.post(url + "/v1/completions", json={**body, "prompt": "x", "max_tokens": 1, "stream": True})
    assert "kv_transfer_params" not in streamed.text
    answer = http.post(url + "/v1/responses", json={**body, "input": "x", "max_output_tokens": 40}).json()
    assert answer["kv_transfer_params"]["do_remote_prefill"]
    events = http.post(url + "/v1/responses", json={**body, "input": "x", "stream": True}).text
    last = json.loads(events.strip().splitlines()[-1].removeprefix("data: "))
    assert last["type"] == "response.completed"
    assert last["response"]["kv_transfer_params"]["do_remote_prefill"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_the_other_apis_pull_too(fleet: EmulatedFleet, http: httpx2.Client, path: str) -> None:
    field, limit = ("prompt", "max_tokens") if path == "/v1/completions" else ("input", "max_output_tokens")
    body = {"model": "emulated", field: "word " * 100}
    first = http.post(
        fleet.engine("p0").url + path, json={**body, limit: 1, "kv_transfer_params": {"do_remote_decode": True}}
    ).json()
    decoded = http.post(fleet.engine("d0").url + path, json={**body, "kv_transfer_params": first["kv_transfer_params"]})
    assert decoded.status_code == 200
    assert fleet.engine("d0").requests[-1].external_tokens == fleet.engine("d0").requests[-1].prompt_tokens


def test_several_choices_pull_once(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    params = prefill(fleet, http)["kv_transfer_params"]
    decoded = chat(fleet, http, "d0", n=3, kv_transfer_params=params).json()
    assert len({choice["message"]["content"] for choice in decoded["choices"]}) == 3
    after = counters(fleet, http, "d0")
    assert after["vllm:nixl_xfer_time_seconds_count"] == 1
    # The siblings compute only what no full block holds.
    assert after["vllm:prompt_tokens_by_source_total/local_compute"] <= 2 * 16


def test_each_choice_counts_its_own_end(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    chat(fleet, http, "d0", n=2, max_tokens=3)
    chat(fleet, http, "d0", n=2)
    after = counters(fleet, http, "d0")
    assert after["vllm:request_success_total/length"] == 2
    assert after["vllm:request_success_total/stop"] == 2


def test_an_engine_without_connector_ignores_the_params(http: httpx2.Client) -> None:
    engines = [{"id": "p0", "role": "prefiller", "connector": "none"}, {"id": "d0", "connector": "none"}]
    with EmulatedFleet(fleet_of(engines, defaults={"time_scale": 0})) as fleet:
        first = prefill(fleet, http)
        assert first["kv_transfer_params"] is None
        nonsense = {"do_remote_prefill": True, "prompt_token_ids": first["prompt_token_ids"]}
        decoded = chat(fleet, http, "d0", messages=[{"role": "user", "content": "?"}], kv_transfer_params=nonsense)
        assert decoded.json()["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]
        assert fleet.engine("d0").held_requests == 0


# ---- what is refused -----------------------------------------------------------------------------------------


def refused(fleet: EmulatedFleet, http: httpx2.Client, answer: httpx2.Response, reason: str) -> str:
    """Assert one refusal, counted under its reason; return its message."""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["reason"] == reason
    assert counters(fleet, http, "d0")[f"conserve_emulator_refusals_total/{reason}"] >= 1
    assert fleet.engine("d0").requests[-1].refusal == reason
    return str(error["message"])


def test_params_are_good_for_one_use(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    params = prefill(fleet, http)["kv_transfer_params"]
    assert chat(fleet, http, "d1", kv_transfer_params=params).status_code == 200
    message = refused(fleet, http, chat(fleet, http, "d0", kv_transfer_params=params), "used_twice")
    assert "already used" in message


def test_expired_params_are_refused_with_their_age(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    params = prefill(fleet, http)["kv_transfer_params"]
    fleet.faults("p0", expire_kv=True)
    assert fleet.engine("p0").kv_used_blocks == 0
    message = refused(fleet, http, chat(fleet, http, "d0", kv_transfer_params=params), "expired")
    assert " s ago" in message
    assert counters(fleet, http, "p0")["vllm:nixl_num_kv_expired_reqs_total"] == 1


def test_a_lease_that_ran_out_by_itself_is_refused(http: httpx2.Client) -> None:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=1, time_scale=0, kv_lease_ms=50)) as fleet:
        params = prefill(fleet, http)["kv_transfer_params"]
        wait_until(lambda: fleet.engine("p0").held_requests == 0)
        refused(fleet, http, chat(fleet, http, "d0", kv_transfer_params=params), "expired")


def test_a_longer_prompt_is_refused_where_vllm_would_crash(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    params = prefill(fleet, http)["kv_transfer_params"]
    longer = [*MESSAGES, {"role": "user", "content": "more " * 30}]
    answer = chat(fleet, http, "d0", messages=longer, kv_transfer_params=params)
    message = refused(fleet, http, answer, "prompt_longer_than_prefill")
    blocks = len(params["remote_block_ids"][0])
    assert f"but only {blocks} were prefilled: vLLM 0.32 would crash here (base_worker.py)" in message
    # The mistake did not use the params up.
    assert chat(fleet, http, "d0", kv_transfer_params=params).status_code == 200


def test_another_prompt_of_the_same_size_is_refused(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    params = prefill(fleet, http)["kv_transfer_params"]
    other = [MESSAGES[0], {"role": "user", "content": "hullo"}]
    answer = chat(fleet, http, "d0", messages=other, kv_transfer_params=params)
    assert "differs from the prefilled one at token 253" in refused(fleet, http, answer, "prompt_differs")
    shorter = [MESSAGES[0]]
    answer = chat(fleet, http, "d0", messages=shorter, kv_transfer_params=params)
    refused(fleet, http, answer, "prompt_differs")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"remote_block_ids": None}, "missing_remote_block_ids"),
        ({"remote_block_ids": []}, "empty_remote_block_ids"),
        ({"remote_block_ids": [[]]}, "empty_remote_block_ids"),
        ({"remote_block_ids": "all"}, "bad_remote_block_ids"),
        ({"remote_block_ids": [["a"]]}, "bad_remote_block_ids"),
        ({"remote_block_ids": [[0]]}, "prompt_longer_than_prefill"),
        ({"remote_block_ids": [list(range(100, 200))]}, "block_ids_changed"),
        ({"remote_engine_id": None}, "missing_remote_engine_id"),
        ({"remote_request_id": None}, "missing_remote_request_id"),
        ({"remote_host": None}, "missing_remote_host"),
        ({"remote_port": None}, "missing_remote_port"),
        ({"remote_port": "high"}, "bad_remote_port"),
        ({"remote_request_id": "chatcmpl-nobody"}, "unknown_request"),
        ({"do_remote_prefill": False, "do_remote_decode": True}, "remote_fields_on_prefill"),
    ],
)
def test_malformed_params_are_refused_by_name(
    fleet: EmulatedFleet, http: httpx2.Client, change: dict[str, Any], reason: str
) -> None:
    params = prefill(fleet, http)["kv_transfer_params"] | change
    refused(fleet, http, chat(fleet, http, "d0", kv_transfer_params=params), reason)
    assert chat(fleet, http, "d0").status_code == 200


def test_harmless_oddities_are_accepted_as_vllm_does(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    params = prefill(fleet, http)["kv_transfer_params"]
    odd = params | {
        "remote_port": str(params["remote_port"]),
        "tp_size": 7,
        "remote_block_ids": params["remote_block_ids"][0],
        "remote_prefill_cached_tokens": None,
    }
    assert chat(fleet, http, "d0", kv_transfer_params=odd).status_code == 200
    assert fleet.engine("d0").requests[-1].external_tokens > 0
    nothing = {"do_remote_prefill": False, "do_remote_decode": False, "remote_engine_id": None}
    assert chat(fleet, http, "d0", kv_transfer_params=nothing).json()["kv_transfer_params"] is None


@pytest.mark.parametrize("ids", ["abc", [], [1.5], [True], [-1], [2**33]])
def test_bad_prompt_token_ids(shared_fleet: EmulatedFleet, http: httpx2.Client, ids: object) -> None:
    answer = chat(shared_fleet, http, "d0", kv_transfer_params={"prompt_token_ids": ids})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "kv_transfer_params.prompt_token_ids"


# ---- what fails ----------------------------------------------------------------------------------------------

FAILURES = ["killed", "restarted", "refusing", "wrong port", "out of range", "other block size", "other model"]


def break_transfer(fleet: EmulatedFleet, params: dict[str, Any], how: str) -> dict[str, Any]:
    if how == "killed":
        fleet.kill("p0")
    elif how == "restarted":
        fleet.restart("p0")
    elif how == "refusing":
        fleet.faults("p0", refuse_transfer=True)
    elif how == "wrong port":
        return params | {"remote_port": 1}
    elif how == "out of range":
        return params | {"remote_block_ids": [[10**6] * 100]}
    return params


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("how", FAILURES)
def test_a_failed_transfer_follows_the_policy(http: httpx2.Client, how: str, policy: str) -> None:
    decoder: dict[str, Any] = {"id": "d0"}
    if how == "other block size":
        decoder["block_size"] = 32
    if how == "other model":
        decoder["model"] = "another"
    engines = [{"id": "p0", "role": "prefiller"}, decoder]
    defaults = {"time_scale": 0, "handshake_timeout_ms": 10, "kv_load_failure_policy": policy}
    with EmulatedFleet(fleet_of(engines, defaults=defaults)) as fleet:
        first = prefill(fleet, http)
        params = break_transfer(fleet, first["kv_transfer_params"], how)
        answer = chat(fleet, http, "d0", kv_transfer_params=params)
        after = counters(fleet, http, "d0")
        assert after["vllm:nixl_num_failed_transfers_total"] == 1
        if policy == "fail":
            assert (answer.status_code, answer.json()["error"]["message"]) == (500, "Internal server error")
            assert after["vllm:request_success_total/error"] == 1
            stream = chat(fleet, http, "d0", stream=True, kv_transfer_params=params)
            if how == "refusing":  # the first attempt had claimed the blocks and given them back
                assert stream.json()["error"]["reason"] == "used_twice"
            else:
                assert "Internal server error" in stream.text
                assert stream.text.endswith("data: [DONE]\n\n")
        else:
            local = chat(fleet, http, "d0").json()
            assert answer.json()["choices"] == local["choices"]
            tokens = first["usage"]["prompt_tokens"]
            assert after["vllm:prompt_tokens_by_source_total/local_compute"] == tokens
        assert fleet.engine("d0").kv_used_blocks == 0


def test_a_prefiller_that_dies_while_its_blocks_move(http: httpx2.Client) -> None:
    slow = {"transfer_overhead_us": 400_000, "step_base_us": 1000}
    with EmulatedFleet(default_fleet(prefillers=1, decoders=1, **slow)) as fleet:
        params = prefill(fleet, http)["kv_transfer_params"]
        body = {"model": "emulated", "messages": MESSAGES, "stream": True, "kv_transfer_params": params}
        with http.stream("POST", fleet.engine("d0").url + "/v1/chat/completions", json=body) as stream:
            wait_until(lambda: counters(fleet, http, "d0")["vllm:num_requests_waiting"] == 1)
            fleet.kill("p0")
            text = "".join(stream.iter_text())
        assert text.strip().endswith("[DONE]")
        assert '"error"' not in text
        assert counters(fleet, http, "d0")["vllm:nixl_num_failed_transfers_total"] == 1


def test_a_decoder_that_dies_leaves_the_claimed_blocks_to_the_lease(http: httpx2.Client) -> None:
    slow = {"transfer_overhead_us": 60_000_000, "step_base_us": 1000, "kv_lease_ms": 600}
    with EmulatedFleet(default_fleet(prefillers=1, decoders=1, **slow)) as fleet:
        params = prefill(fleet, http)["kv_transfer_params"]
        body = {"model": "emulated", "messages": MESSAGES, "stream": True, "kv_transfer_params": params}
        with http.stream("POST", fleet.engine("d0").url + "/v1/chat/completions", json=body):
            # Heartbeats keep the claimed blocks beyond their lease.
            time.sleep(0.9)
            assert fleet.engine("p0").held_requests == 1
            fleet.kill("d0")
        wait_until(lambda: fleet.engine("p0").held_requests == 0)


def test_an_aborted_decode_leg_frees_the_prefillers_blocks(http: httpx2.Client) -> None:
    slow = {"transfer_overhead_us": 60_000_000, "step_base_us": 1000}
    with EmulatedFleet(default_fleet(prefillers=1, decoders=1, **slow)) as fleet:
        params = prefill(fleet, http)["kv_transfer_params"]
        body = {"model": "emulated", "messages": MESSAGES, "stream": True, "kv_transfer_params": params}
        with http.stream("POST", fleet.engine("d0").url + "/v1/chat/completions", json=body):
            assert fleet.engine("p0").held_requests == 1
        wait_until(lambda: fleet.engine("p0").held_requests == 0)
        assert fleet.engine("d0").kv_used_blocks == 0

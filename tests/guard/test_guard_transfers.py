"""Transfer params through two guards: what passes is a transfer, what does not is refused by name."""

import json

import pytest

from conserve_sdk.core.units import Ms
from conserve_sdk.tokens import SigningKey

from .conftest import LIFE, MESSAGES, NOW_MS, binding, code, token

OTHER_KEY = SigningKey(kid="main", secret=b"another secret of over thirty-two bytes")
HOLD = {"do_remote_decode": True}


def test_a_transfer_passes_two_guards_and_says_what_one_engine_says(guarded):
    params = guarded.prefill()
    assert "conserve_stamp" in params
    answer = guarded.decode(params)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == guarded.post("d1", guarded.body()).json()["choices"]
    assert guarded.transferred() == answer.json()["usage"]["prompt_tokens"]


def test_a_streamed_decode_leg_comes_as_it_is(guarded):
    answer = guarded.decode(guarded.prefill(), body=guarded.body(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.rstrip().endswith("data: [DONE]")
    assert guarded.transferred() > 0


@pytest.mark.parametrize("api", ["completions", "responses"])
def test_the_other_routes_transfer_as_well(guarded, api):
    asked = {"prompt": "word " * 200} if api == "completions" else {"input": "word " * 200}
    limit = "max_tokens" if api == "completions" else "max_output_tokens"
    body = {"model": guarded.fleet.engines[0].model, **asked}
    leg = body | {limit: 1, "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}
    first = guarded.post("p0", leg, lease_token=token(), path=f"/v1/{api}")
    params = first.json()["kv_transfer_params"]
    decode = body | {limit: 9, "kv_transfer_params": params}
    answer = guarded.post("d0", decode, lease_token=token(), path=f"/v1/{api}")
    assert answer.status_code == 200, answer.text
    assert guarded.transferred() > 0


def test_a_held_pull_goes_on_without_the_count_that_could_hang_it(guarded):
    params = guarded.prefill() | HOLD
    answer = guarded.decode(params)
    assert answer.status_code == 200, answer.text
    assert guarded.fleet.engine("d0").held_requests == 1


def test_a_held_pull_of_a_lease_without_hold_only_pulls(guarded):
    no_hold = token(hold_ms=Ms(0))
    answer = guarded.decode(guarded.prefill(lease_token=no_hold) | HOLD, lease_token=no_hold)
    assert answer.status_code == 200, answer.text
    assert guarded.transferred() > 0
    assert guarded.fleet.engine("d0").held_requests == 0


def test_a_follow_up_may_be_held(guarded):
    answer = guarded.post("d0", guarded.body(kv_transfer_params=HOLD), lease_token=token())
    assert answer.status_code == 200
    assert "x-conserve-guard" not in answer.headers
    assert guarded.fleet.engine("d0").held_requests == 1


@pytest.mark.parametrize(
    ("lease_token", "reason"),
    [
        (None, "lease_required"),
        ("garbage", "lease_invalid"),
        (token(OTHER_KEY), "lease_invalid"),
        (token(exp_ms=Ms(NOW_MS - 60_000)), "lease_expired"),
        (token(decoder=binding("d9")), "lease_elsewhere"),
        (token(decoder=binding("d0", incarnation="life-0")), "engine_restarted"),
        (token(hold_ms=Ms(0)), "hold_not_granted"),
    ],
    ids=["none", "garbled", "forged", "expired", "elsewhere", "restarted", "not granted"],
)
def test_a_hold_without_a_good_lease_is_a_plain_turn(guarded, lease_token, reason):
    answer = guarded.post("d0", guarded.body(kv_transfer_params=HOLD), lease_token=lease_token)
    assert answer.status_code == 200
    assert answer.headers["x-conserve-guard"] == f"hold-stripped; reason={reason}"
    assert guarded.fleet.engine("d0").held_requests == 0


@pytest.mark.parametrize(
    ("lease_token", "status", "expected"),
    [
        ("", 403, "lease_required"),
        (token(OTHER_KEY), 403, "lease_invalid"),
        (token(exp_ms=Ms(NOW_MS - 60_000)), 409, "lease_expired"),
        (token(decoder=binding("d1")), 409, "lease_elsewhere"),
        (token(decoder=binding("d0", incarnation="life-0")), 409, "engine_restarted"),
        (token(lease_id="lease-2"), 409, "transfer_foreign"),
        (token(prefiller=binding("p1")), 409, "transfer_foreign"),
        (token(prefiller=None), 409, "transfer_foreign"),
    ],
    ids=["none", "forged", "expired", "other decoder", "restarted", "other lease", "other prefiller", "local"],
)
def test_a_pull_needs_the_lease_it_was_made_for(guarded, lease_token, status, expected):
    body = guarded.body(kv_transfer_params=guarded.prefill())
    answer = guarded.post("d0", body, lease_token=lease_token or None)
    assert (answer.status_code, code(answer)) == (status, expected)
    assert guarded.transferred() == 0


@pytest.mark.parametrize(
    ("lease_token", "status", "expected"),
    [
        (None, 403, "lease_required"),
        (token(OTHER_KEY), 403, "lease_invalid"),
        (token(prefiller=binding("p9")), 409, "lease_elsewhere"),
        (token(prefiller=binding("p0", incarnation="life-0")), 409, "engine_restarted"),
        (token(prefiller=None, decoder=binding("p0")), 409, "lease_elsewhere"),
    ],
    ids=["none", "forged", "elsewhere", "restarted", "decodes only"],
)
def test_a_prefill_leg_needs_a_lease_that_prefills_here(guarded, lease_token, status, expected):
    leg = guarded.body(kv_transfer_params={"do_remote_decode": True, "do_remote_prefill": False})
    answer = guarded.post("p0", leg, lease_token=lease_token)
    assert (answer.status_code, code(answer)) == (status, expected)
    assert guarded.fleet.engine("p0").held_requests == 0


def test_params_are_used_once(guarded):
    params = guarded.prefill()
    assert guarded.decode(params).status_code == 200
    again = guarded.decode(params)
    assert (again.status_code, code(again)) == (409, "transfer_used")


@pytest.mark.parametrize(("age_ms", "status"), [(0, 200), (19_999, 200), (20_000, 409), (40_000, 409)])
def test_params_have_a_deadline_from_the_prefillers_answer(guarded, age_ms, status):
    params = guarded.prefill()
    guarded.clock.now_ms += age_ms
    answer = guarded.decode(params)
    assert answer.status_code == status
    assert status == 200 or code(answer) == "transfer_expired"


def test_params_from_the_future_tell_of_clocks_that_differ(guarded):
    params = guarded.prefill()
    guarded.clock.now_ms -= 5_001
    assert code(guarded.decode(params)) == "clock_skew"


ALTERED = {
    "other blocks": {"remote_block_ids": [[1, 2, 3]]},
    "other request": {"remote_request_id": "chatcmpl-somebody-elses"},
    "other engine": {"remote_engine_id": "somebody"},
    "other host": {"remote_host": "203.0.113.1"},
    "other port": {"remote_port": 1},
    "other parallelism": {"tp_size": 2},
    "other count": {"remote_num_tokens": 9_999},
    "other expiry": {"remote_blocks_expiry_time": 5},
}


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED)
def test_params_come_back_as_they_went_out(guarded, change):
    answer = guarded.decode(guarded.prefill() | change)
    assert (answer.status_code, code(answer)) == (409, "transfer_altered")


@pytest.mark.parametrize("stamp", ["", "a.b.c", "é.b.c", 7, None, "x" * 5000, "W10.W10.x"])
def test_a_stamp_is_not_made_by_clients(guarded, stamp):
    answer = guarded.decode(guarded.prefill() | {"conserve_stamp": stamp})
    assert (answer.status_code, code(answer)) == (409, "transfer_unstamped")


def test_a_lease_token_is_no_stamp(guarded):
    assert code(guarded.decode(guarded.prefill() | {"conserve_stamp": token()})) == "transfer_unstamped"


SHAPES = {
    "alone": {"do_remote_prefill": True},
    "not an object": [1],
    "a text": "do_remote_prefill",
    "truthy": {"do_remote_prefill": 1},
    "truthy hold": {"do_remote_decode": "yes"},
    "unknown key": {"do_remote_decode": True, "anything": 1},
    "remote fields on a hold": {"do_remote_decode": True, "remote_engine_id": "x", "remote_block_ids": [[1]]},
}
CHANGES = {
    "empty blocks": {"remote_block_ids": []},
    "an empty group": {"remote_block_ids": [[]]},
    "blocks of text": {"remote_block_ids": [["1"]]},
    "negative blocks": {"remote_block_ids": [[-1]]},
    "blocks missing": {"remote_block_ids": None},
    "no request id": {"remote_request_id": None},
    "no engine": {"remote_engine_id": ""},
    "no host": {"remote_host": None},
    "port as text": {"remote_port": "5600"},
    "port out of range": {"remote_port": 70_000},
    "push": {"transfer_mode": "push"},
    "no parallelism": {"tp_size": 0},
    "a key more": {"_remote_blocks_processed": True},
    "ids of text": {"prompt_token_ids": ["1"]},
    "no ids": {"prompt_token_ids": []},
    "ids beyond belief": {"prompt_token_ids": [1 << 70]},
}


@pytest.mark.parametrize("params", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("engine_id", ["p0", "d0"])
def test_shapes_that_hurt_an_engine_are_refused(guarded, engine_id, params):
    answer = guarded.post(engine_id, guarded.body(kv_transfer_params=params), lease_token=token())
    assert (answer.status_code, code(answer)) == (400, "bad_transfer_params")
    assert answer.json()["error"]["type"] == "conserve_guard_refusal"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_pulls_that_hurt_an_engine_are_refused(guarded, change):
    answer = guarded.decode(guarded.prefill() | change)
    assert (answer.status_code, code(answer)) == (400, "bad_transfer_params")


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": False}], ids=str)
def test_params_that_ask_for_nothing_are_taken_out(guarded, params):
    answer = guarded.post("d0", guarded.body(kv_transfer_params=params))
    assert answer.status_code == 200


# ---- the prompt -----------------------------------------------------------------------------------------------


OTHER_PROMPTS = {
    "longer": {"messages": [*MESSAGES, {"role": "user", "content": "more " * 100}]},
    "same length, other words": {"messages": [MESSAGES[0], {"role": "user", "content": "hallo"}]},
    "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    "template arguments": {"chat_template_kwargs": {"enable_thinking": True}},
    "salt": {"cache_salt": "x"},
}


@pytest.mark.parametrize("change", OTHER_PROMPTS.values(), ids=OTHER_PROMPTS)
def test_the_decode_leg_has_the_prompt_that_was_prefilled(guarded, change):
    answer = guarded.decode(guarded.prefill(), body=guarded.body() | change)
    assert (answer.status_code, code(answer)) == (409, "prompt_differs")


def test_one_body_is_two_prompts_on_two_routes(guarded):
    both = guarded.body(prompt="short")
    params = guarded.prefill(both)
    leg = both | {"kv_transfer_params": params}
    answer = guarded.post("d0", leg, lease_token=token(), path="/v1/completions")
    assert (answer.status_code, code(answer)) == (409, "prompt_differs")


def test_the_ids_are_those_that_were_prefilled(guarded):
    params = guarded.prefill()
    longer = params | {"prompt_token_ids": params["prompt_token_ids"] + [5] * 64}
    assert code(guarded.decode(longer)) == "prompt_differs"
    assert guarded.decode(params).status_code == 200, "a refused set is not used up"


def test_a_chat_prompt_comes_with_its_ids(guarded):
    params = guarded.prefill()
    del params["prompt_token_ids"]
    assert code(guarded.decode(params)) == "ids_missing"


def test_ids_that_the_prefiller_never_told_are_not_believed(guarded):
    leg = guarded.body(max_tokens=1, kv_transfer_params={"do_remote_decode": True, "do_remote_prefill": False})
    params = guarded.post("p0", leg, lease_token=token()).json()["kv_transfer_params"]
    assert code(guarded.decode(params | {"prompt_token_ids": [1, 2, 3]})) == "prompt_differs"


UNFIT = {
    "choices": {"n": 2},
    "best of": {"best_of": 2},
    "beams": {"use_beam_search": True},
    "truncated": {"truncate_prompt_tokens": 10},
    "truncation": {"truncation": "auto"},
    "echo": {"echo": True},
    "prompt logprobs": {"prompt_logprobs": 1},
    "chained": {"previous_response_id": "resp_1"},
    "media": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://pictures.invalid/1"}}]}
        ]
    },
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_requests_of_several_sequences_compute_their_own_prompt(guarded, change):
    answer = guarded.decode(guarded.prefill(), body=guarded.body() | change)
    assert (answer.status_code, code(answer)) == (409, "transfer_unfit")


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/v1/messages", "/inference/v1/generate"])
def test_only_routes_of_one_prompt_may_pull(guarded, path):
    leg = guarded.body(kv_transfer_params=guarded.prefill())
    answer = guarded.post("d0", leg, lease_token=token(), path=path)
    assert (answer.status_code, code(answer)) == (409, "transfer_unfit")


def test_several_prompts_may_not_pull(guarded):
    leg = {"model": "emulated", "prompt": ["a", "b"], "kv_transfer_params": guarded.prefill()}
    assert code(guarded.post("d0", leg, lease_token=token(), path="/v1/completions")) == "transfer_unfit"


# ---- identity -------------------------------------------------------------------------------------------------


def test_the_guard_counts_what_it_did(guarded):
    guarded.decode(guarded.prefill())
    guarded.decode({"do_remote_prefill": True})
    guarded.post("d0", guarded.body(kv_transfer_params=HOLD))
    told = guarded.http.get(guarded.fleet.engine("d0").url + "/conserve/engine").json()
    assert told["engine_id"] == "d0"
    assert told["incarnation"] == LIFE
    assert told["guard"] == {
        "pull": 1,
        "plain": 1,
        "refused.bad_transfer_params": 1,
        "stripped.lease_required": 1,
    }
    assert json.dumps(told)

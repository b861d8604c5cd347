"""Transfer params that could arrive too late, differ between the legs, or come from the application by a side door."""

from __future__ import annotations

import json

import httpx2
import pytest

from conserve_sdk._bodies import read_body, without_transfer
from conserve_sdk._kind import Kind
from conserve_sdk.testing import EngineReply, ScriptedEngine

PARAMS = {"do_remote_prefill": True}
SLOW = [httpx2.PoolTimeout, httpx2.ConnectTimeout, httpx2.WriteTimeout]


# ---- the deadline ---------------------------------------------------------------------------------------------


def test_waiting_for_a_connection_cannot_carry_the_params_past_their_deadline(make_world) -> None:
    """The prefiller's lease of 30 s runs on while the decoder is not reached; after it the answer could be wrong."""
    world = make_world()
    world.turn(timeout=600.0)
    pull = world.engine.calls[1]
    assert pull.body["kv_transfer_params"]["do_remote_prefill"]
    assert sum(pull.timeout[phase] for phase in ("pool", "connect", "write")) <= 20.0
    assert pull.timeout["read"] == 600.0


@pytest.mark.parametrize("slow", SLOW)
def test_params_that_did_not_get_there_in_time_are_given_up(make_world, slow) -> None:
    world = make_world(engine=ScriptedEngine(then="answer").script("d0", EngineReply(raises=slow("too slow"))))
    answer = world.turn(timeout=600.0)
    assert answer.error is None
    assert world.engines_called == ["p0", "d0", "d0"]
    second = world.engine.calls[2]
    assert not (second.body.get("kv_transfer_params") or {}).get("do_remote_prefill")
    assert second.timeout["connect"] == 600.0
    assert (world.record.loss, world.record.migrated, world.record.failovers) == ("transfer_expired", False, 0)
    assert world.turn(messages=None, conversation_id="c2").error is None


@pytest.mark.parametrize(("slow", "called"), [(SLOW[1], ["p0", "d0", "p0", "d1"]), (SLOW[0], ["p0", "d0"])])
def test_the_applications_own_limits_mean_what_they_meant(make_world, slow, called) -> None:
    world = make_world(engine=ScriptedEngine(then="answer").script("d0", EngineReply(raises=slow("too slow"))))
    answer = world.turn(timeout=httpx2.Timeout(600.0, connect=5.0, pool=5.0))
    assert world.engines_called == called
    assert (answer.error is None) == (len(called) > 2)


# ---- legs that could differ -----------------------------------------------------------------------------------


def image(url: str) -> list[dict]:
    parts = [{"type": "text", "text": "what is it? " * 200}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": parts}]


def test_what_each_engine_would_fetch_for_itself_does_not_travel(make_world) -> None:
    world = make_world()
    assert world.turn(messages=image("https://example.com/webcam.png")).error is None
    assert world.engines_called == ["d0"]
    assert world.record.loss == "remote_media"
    world.turn(messages=image("data:image/png;base64,AAAA"), conversation_id="c2")
    assert world.record.migrated


def test_a_prompt_cut_by_the_engine_does_not_travel(make_world) -> None:
    world = make_world()
    assert world.turn(extra_body={"truncate_prompt_tokens": -1}).error is None
    assert world.engines_called == ["d0"]
    assert world.record.loss == "truncated_prompt"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"truncation": "auto"}, "truncated_prompt"),
        ({"truncation": "disabled"}, ""),
        ({"truncation": None}, ""),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://a/b"}]}]},
            "remote_media",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "http://a/b"}]}]}, "remote_media"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "http://a/b"}]}]}, ""),
        ({"input": "http://a/b"}, ""),
    ],
)
def test_responses_too(fields, reason) -> None:
    assert read_body(Kind.RESPONSES, json.dumps({"model": "m", **fields}).encode()).local_because == reason


def test_a_prefiller_is_not_blamed_for_what_the_request_got_wrong(make_world) -> None:
    """`logprobs` above the engine's limit reach the decoder only: a prefiller must not leave the fleet for that."""
    refused = EngineReply.failure(400, "logprobs must be at most 20")
    world = make_world(engine=ScriptedEngine(EngineReply.prefill(), refused, refused))
    assert world.turn(logprobs=True, top_logprobs=99).error.status_code == 400
    assert world.reports("engine_failure") == []


# ---- the side door --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [], "kv_transfer_params": PARAMS},
        {"requests": [{"kv_transfer_params": PARAMS}], "n": 1},
        {"sampling_params": {"extra_args": {"kv_transfer_params": PARAMS}}},
    ],
)
def test_other_routes_carry_no_params_either(world, body) -> None:
    world.turn()
    http = world.run(world.conserve.http_client, _made(world.conserve.async_http_client))
    world.run(lambda: http.post("/messages", json=body), lambda: http.post("/messages", json=body))
    call = world.engine.calls[-1]
    assert call.path == "/v1/messages"
    assert b"kv_transfer_params" not in call.content


def test_what_holds_none_stays_as_it_is() -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="kv_transfer_params"\r\n\r\n1\r\n--x--'
    for raw in (b"", b'{ "a" : "kv_transfer_params" }', b'{"a":"\\u00e9"}', form):
        assert without_transfer(raw) == raw
    assert without_transfer(b'{"\\u006bv_transfer_params":{},"a":1}') == b'{"a":1}'


def _made(make):
    async def coroutine():
        return make()

    return coroutine


# ---- names the broker cannot take -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["my model", "modèle", "m" * 257])
def test_a_model_name_that_no_broker_takes_is_a_bad_request(world, model) -> None:
    answer = world.turn(model=model)
    assert answer.error.status_code == 400
    assert "'model' must be" in str(answer.error)
    assert not world.engine.calls

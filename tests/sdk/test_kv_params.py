"""The corruption and crash cases of vLLM 0.32's NIXL connector, as refusals made before anything is sent."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest

from conserve_sdk._kv_params import TransferRefused, TransferTicket, read_ticket
from conserve_sdk.testing._replies import TRANSFER_PARAMS

GOOD: dict[str, Any] = {"kv_transfer_params": TRANSFER_PARAMS, "prompt_token_ids": [5, 6, 7]}


def ticket(answer: Any = GOOD, *, send_ids: bool = True, now_ms: int = 1_000) -> TransferTicket:
    return read_ticket(answer, lease_id="l1", now_ms=now_ms, deadline_ms=20_000, send_ids=send_ids)


def refusal(answer: Any) -> TransferRefused:
    with pytest.raises(TransferRefused) as caught:
        ticket(answer)
    return caught.value


def test_params_come_back_verbatim_with_the_prefillers_token_ids() -> None:
    params = ticket().redeem(lease_id="l1", now_ms=1_000, hold=False)
    assert params == {**TRANSFER_PARAMS, "prompt_token_ids": [5, 6, 7]}


def test_without_ids_where_the_route_does_not_read_them() -> None:
    assert ticket(send_ids=False).redeem(lease_id="l1", now_ms=1_000, hold=False) == TRANSFER_PARAMS
    answer = {"kv_transfer_params": TRANSFER_PARAMS, "prompt_token_ids": None}
    assert ticket(answer).redeem(lease_id="l1", now_ms=1_000, hold=False) == TRANSFER_PARAMS


def test_hold_asks_the_decoder_to_keep_the_blocks_too() -> None:
    params = ticket().redeem(lease_id="l1", now_ms=1_000, hold=True)
    assert (params["do_remote_prefill"], params["do_remote_decode"]) == (True, True)
    assert TRANSFER_PARAMS["do_remote_decode"] is False


def test_a_held_pull_can_fail_without_waiting_for_ever() -> None:
    """vLLM parks a held request that kept `remote_num_tokens` when its transfer fails, and never ends it."""
    answer = {"kv_transfer_params": {**TRANSFER_PARAMS, "remote_num_tokens": 100}}
    params = ticket(answer).redeem(lease_id="l1", now_ms=1_000, hold=True)
    assert "remote_num_tokens" not in params
    assert ticket(answer).redeem(lease_id="l1", now_ms=1_000, hold=False)["remote_num_tokens"] == 100


def test_a_pull_that_needs_its_token_count_is_not_held() -> None:
    answer = {"kv_transfer_params": {**TRANSFER_PARAMS, "dcp_size": 2, "remote_num_tokens": 100}}
    params = ticket(answer).redeem(lease_id="l1", now_ms=1_000, hold=True)
    assert (params["remote_num_tokens"], params["do_remote_decode"]) == (100, False)


def test_params_are_used_once() -> None:
    once = ticket()
    once.redeem(lease_id="l1", now_ms=1_000, hold=False)
    with pytest.raises(TransferRefused) as caught:
        once.redeem(lease_id="l1", now_ms=1_000, hold=False)
    assert caught.value.loss == "transfer_used"


def test_a_refused_use_is_a_use() -> None:
    once = ticket()
    with pytest.raises(TransferRefused):
        once.redeem(lease_id="other", now_ms=1_000, hold=False)
    with pytest.raises(TransferRefused) as caught:
        once.redeem(lease_id="l1", now_ms=1_000, hold=False)
    assert caught.value.loss == "transfer_used"


def test_many_threads_get_one_use() -> None:
    once, start, won = ticket(), threading.Barrier(8), []

    def redeem() -> None:
        start.wait()
        with contextlib.suppress(TransferRefused):
            won.append(once.redeem(lease_id="l1", now_ms=1_000, hold=False))

    threads = [threading.Thread(target=redeem) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


@pytest.mark.parametrize(("now_ms", "fine"), [(20_999, True), (21_000, False), (50_000, False)])
def test_the_deadline_is_exact(now_ms: int, fine: bool) -> None:
    if fine:
        assert ticket().redeem(lease_id="l1", now_ms=now_ms, hold=False)
        return
    with pytest.raises(TransferRefused) as caught:
        ticket().redeem(lease_id="l1", now_ms=now_ms, hold=False)
    assert caught.value.loss == "transfer_expired"


def test_params_do_not_pass_from_one_lease_to_another() -> None:
    with pytest.raises(TransferRefused) as caught:
        ticket().redeem(lease_id="l2", now_ms=1_000, hold=False)
    assert caught.value.loss == "transfer_foreign"


@pytest.mark.parametrize("answer", [None, [], "x", {}, {"kv_transfer_params": None}])
def test_no_params(answer: Any) -> None:
    assert refusal(answer).loss == "no_transfer_params"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"do_remote_prefill": False}, "do_remote_prefill"),
        ({"do_remote_prefill": 1}, "do_remote_prefill"),
        ({"remote_block_ids": []}, "remote_block_ids"),
        ({"remote_block_ids": [[]]}, "remote_block_ids"),
        ({"remote_block_ids": [[1], []]}, "remote_block_ids"),
        ({"remote_block_ids": [["1"]]}, "remote_block_ids"),
        ({"remote_block_ids": [[True]]}, "remote_block_ids"),
        ({"remote_block_ids": None}, "remote_block_ids"),
        ({"remote_request_id": None}, "remote_request_id"),
        ({"remote_request_id": ""}, "remote_request_id"),
        ({"remote_engine_id": 7}, "remote_engine_id"),
        ({"remote_host": None}, "remote_host"),
        ({"remote_port": "5600"}, "remote_port"),
        ({"remote_port": 0}, "remote_port"),
        ({"remote_port": 65536}, "remote_port"),
        ({"tp_size": "1"}, "tp_size"),
        ({"tp_size": 0}, "tp_size"),
    ],
)
def test_params_that_a_decoder_might_not_survive(change: dict[str, Any], says: str) -> None:
    refused = refusal({"kv_transfer_params": {**TRANSFER_PARAMS, **change}})
    assert refused.loss == "bad_transfer_params"
    assert says in str(refused)


@pytest.mark.parametrize("missing", ["remote_block_ids", "remote_request_id", "remote_engine_id", "remote_port"])
def test_params_with_a_key_missing(missing: str) -> None:
    params = {key: value for key, value in TRANSFER_PARAMS.items() if key != missing}
    assert missing in str(refusal({"kv_transfer_params": params}))


def test_params_that_are_no_object() -> None:
    assert refusal({"kv_transfer_params": "x"}).loss == "bad_transfer_params"


@pytest.mark.parametrize("ids", [[], "abc", [1, -1], [1, "2"], [True]])
def test_token_ids_that_are_none(ids: Any) -> None:
    refused = refusal({"kv_transfer_params": TRANSFER_PARAMS, "prompt_token_ids": ids})
    assert "prompt_token_ids" in str(refused)


def test_a_flat_list_of_blocks_is_sound_and_tp_size_may_be_missing() -> None:
    params = {key: value for key, value in TRANSFER_PARAMS.items() if key != "tp_size"}
    params["remote_block_ids"] = [1, 2]
    assert ticket({"kv_transfer_params": params}).redeem(lease_id="l1", now_ms=0, hold=False) == params

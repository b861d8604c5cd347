"""`kv_transfer_params`: made here only, checked before use, used once, within a deadline.

Why so strict, measured on vLLM 0.32 with NIXL: params that were used before or whose blocks have expired answer 200
with wrong text and leave it in the decoder's prefix cache; params without their blocks or ids end the decoder process
or hang the request. No engine-side check exists, so a set that is not beyond doubt is not sent at all: the decoder
then computes the prompt itself, which costs time and never an answer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

__all__ = ["HOLD", "PREFILL", "TransferRefused", "TransferTicket", "read_ticket"]

PREFILL: Mapping[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
"""Asks the prefiller to keep the prompt's blocks for a decoder."""

HOLD: Mapping[str, Any] = {"do_remote_decode": True}
"""Asks a decoder to keep the turn's blocks for its own `kv_lease_duration`, so that the next turn finds them."""


class TransferRefused(Exception):  # noqa: N818 -- says what happened
    """These params must not be sent. `loss` is the short name under which the turn counts the lost transfer."""

    def __init__(self, loss: str, detail: str) -> None:
        super().__init__(detail)
        self.loss = loss


class TransferTicket:
    """The right to pull one prefilled prompt, once, for one lease, until a deadline.

    Attributes:
        lease_id: the lease whose prefill leg made the params.
        deadline_ms: from then on they may not be sent.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        *,
        lease_id: str,
        deadline_ms: int,
        token_ids: list[int] | None,
    ) -> None:
        self.lease_id = lease_id
        self._params: dict[str, Any] | None = dict(params)
        if token_ids is not None:
            self._params["prompt_token_ids"] = token_ids
        self.deadline_ms = deadline_ms
        self._lock = threading.Lock()

    def redeem(self, *, lease_id: str, now_ms: int, hold: bool) -> dict[str, Any]:
        """The params to send, for the first and only time.

        Args:
            lease_id: the lease of the decode leg.
            now_ms: instant on the clock of the deadline.
            hold: also ask the decoder to keep the blocks after the turn.

        Raises:
            TransferRefused: used before, expired, or made for another lease.
        """
        with self._lock:
            params, self._params = self._params, None
        if params is None:
            raise TransferRefused("transfer_used", "these transfer params were already sent once")
        if lease_id != self.lease_id:
            raise TransferRefused("transfer_foreign", f"made for lease {self.lease_id}, not for {lease_id}")
        if now_ms >= self.deadline_ms:
            raise TransferRefused("transfer_expired", "the prefiller may have re-used the blocks by now")
        return _held(params) if hold else params


def read_ticket(answer: object, *, lease_id: str, now_ms: int, deadline_ms: int, send_ids: bool) -> TransferTicket:
    """Read the prefiller's answer.

    Args:
        answer: the parsed JSON body.
        lease_id: the lease this prefill was made for.
        now_ms: when the answer arrived.
        deadline_ms: for how long from then the params may be sent; well under the engine's own lease (30 s).
        send_ids: give the decoder the prefiller's own token ids, where the answer has them, so that the two legs
            cannot tokenise differently.

    Raises:
        TransferRefused: no params (`no_transfer_params`) or a shape that a decoder might not survive
            (`bad_transfer_params`).
    """
    params = answer.get("kv_transfer_params") if isinstance(answer, dict) else None
    if not isinstance(answer, dict) or params is None:
        raise TransferRefused("no_transfer_params", "the prefiller has no KV connector, or moved nothing")
    problem = _problem(params)
    if problem:
        raise TransferRefused("bad_transfer_params", problem)
    ids = answer.get("prompt_token_ids") if send_ids else None
    if ids is not None and not _is_token_ids(ids):
        raise TransferRefused("bad_transfer_params", "prompt_token_ids is not a list of token ids")
    return TransferTicket(params, lease_id=lease_id, deadline_ms=now_ms + deadline_ms, token_ids=ids)


def _held(params: dict[str, Any]) -> dict[str, Any]:
    """The same pull, of blocks that the decoder shall keep after the turn, in a form that can fail.

    vLLM 0.32 (`nixl/pull_scheduler.py`, `get_num_new_matched_tokens`) takes a request that both pulls and is held, once
    it is scheduled again because its transfer failed or it was preempted, for the way back of a two-way transfer, waits
    for blocks that nobody sends, and never ends it. Without `remote_num_tokens` there is nothing to wait for. The pull
    itself needs that key only with decode context parallelism; such a turn is not held.
    """
    if params.get("dcp_size", 1) != 1:
        return params
    return {key: value for key, value in params.items() if key != "remote_num_tokens"} | {"do_remote_decode": True}


def _problem(params: object) -> str:
    """What is missing or wrong, in words; empty when the shape is sound (vLLM's NIXL connector in pull mode)."""
    if not isinstance(params, dict):
        return "kv_transfer_params is not an object"
    problems = {
        "do_remote_prefill is not true": params.get("do_remote_prefill") is not True,
        "remote_engine_id is missing": not _is_name(params.get("remote_engine_id")),
        "remote_request_id is missing": not _is_name(params.get("remote_request_id")),
        "remote_host is missing": not _is_name(params.get("remote_host")),
        "remote_port is not a port": _whole(params.get("remote_port")) not in range(1, 65536),
        "tp_size is not a number": _whole(params.get("tp_size", 1)) < 1,
        "remote_block_ids is missing or has an empty group": not _are_blocks(params.get("remote_block_ids")),
    }
    return next((problem for problem, found in problems.items() if found), "")


def _are_blocks(blocks: object) -> bool:
    """One list of block ids per KV cache group; a single group may stand alone."""
    if not isinstance(blocks, list) or not blocks:
        return False
    groups = blocks if isinstance(blocks[0], list) else [blocks]
    return all(isinstance(group, list) and group and all(_whole(item) >= 0 for item in group) for group in groups)


def _whole(value: object) -> int:
    """The integer, or -1 for anything else (JSON's `true` is no number here)."""
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_whole(item) >= 0 for item in value)

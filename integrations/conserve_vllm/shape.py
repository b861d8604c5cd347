"""The shapes of `kv_transfer_params` that vLLM 0.32's NIXL connector survives; everything else is refused."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from conserve_vllm.refusal import Refusal
from conserve_vllm.stamp import STAMP_KEY

__all__ = ["Wish", "read_wish"]

CODE = "bad_transfer_params"

KEEP_KEYS = frozenset({"do_remote_decode", "do_remote_prefill"})
PULL_KEYS = frozenset(
    {
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
        "remote_blocks_expiry_time",
        "transfer_mode",
        "remote_num_tokens",
        "remote_prefill_cached_tokens",
        "prompt_token_ids",
        STAMP_KEY,
    }
)


class Wish(StrEnum):
    """What params ask for."""

    NOTHING = "nothing"
    KEEP = "keep"
    """Keep the blocks when the request is over: a prefill leg, or a hold."""
    PULL = "pull"
    """Read the prompt's blocks from a prefiller."""


def read_wish(params: object) -> Wish:
    """What these params ask for.

    Raises:
        Refusal: a shape that an engine might not survive.
    """
    if params is None or params == {}:
        return Wish.NOTHING
    if not isinstance(params, dict):
        raise _bad("must be an object")
    for name in ("do_remote_prefill", "do_remote_decode"):
        if not isinstance(params.get(name, False), bool):
            raise _bad(f"{name} must be true or false")
    if params.get("do_remote_prefill"):
        _check_pull(params)
        return Wish.PULL
    if extra := sorted(set(params) - KEEP_KEYS):
        raise _bad(f"{extra[0][:64]!r} has no place beside do_remote_decode alone")
    if not params.get("do_remote_decode"):
        return Wish.NOTHING
    return Wish.KEEP


def _check_pull(params: Mapping[str, Any]) -> None:
    if extra := sorted(set(params) - PULL_KEYS):
        raise _bad(f"{extra[0][:64]!r} is no key of a prefill answer's params")
    for name in ("remote_engine_id", "remote_request_id", "remote_host"):
        if not isinstance(params.get(name), str) or not params[name]:
            raise _bad(f"{name} must be a text")
    if not _is_whole(params.get("remote_port")) or not 0 < params["remote_port"] < 65_536:
        raise _bad("remote_port must be a port number")
    for name in ("tp_size", "dcp_size", "pp_size"):
        if not _is_whole(params.get(name, 1)) or params.get(name, 1) < 1:
            raise _bad(f"{name} must be a whole number of at least 1")
    if params.get("transfer_mode", "pull") != "pull":
        raise _bad("transfer_mode must be 'pull'")
    if not _are_blocks(params.get("remote_block_ids")):
        raise _bad("remote_block_ids must be one non-empty list of block ids per KV cache group")


def _are_blocks(blocks: object) -> bool:
    if not isinstance(blocks, list) or not blocks:
        return False
    groups = blocks if isinstance(blocks[0], list) else [blocks]
    return all(isinstance(group, list) and group and all(map(_is_block, group)) for group in groups)


def _is_block(value: object) -> bool:
    return _is_whole(value) and isinstance(value, int) and value >= 0


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad(problem: str) -> Refusal:
    return Refusal(400, CODE, f"kv_transfer_params: {problem}; send the prefill answer's params unchanged")

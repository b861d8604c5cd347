"""Reading `kv_transfer_params`: shape checks before anything else happens.

What real vLLM 0.32 answers to malformed params with a crash, a hang or a wrong text is refused here with a sentence
that names the mistake. The rules are vLLM's nixl/pull_scheduler.py and base_worker.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from conserve_lab.emulator.errors import ApiError, invalid
from conserve_lab.emulator.language import TokenIds
from conserve_lab.emulator.language.tokens import new_tokens
from conserve_vllm.holds import HoldOrder, read_order

FIELD: Final = "kv_transfer_params"


@dataclass(frozen=True, slots=True, kw_only=True)
class PullParams:
    """Where a decoder reads a prompt's KV from."""

    block_ids: tuple[int, ...]
    engine_id: str
    request_id: str
    host: str
    port: int
    prefill_cached_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KvWish:
    """What a request wants of the KV connector."""

    hold: bool = False
    """`do_remote_decode`: keep the blocks for a lease."""
    pull: PullParams | None = None
    """`do_remote_prefill`: read the prompt's KV from a peer."""
    order: HoldOrder | None = None
    """Whose hold it is, where a guard wrote it down."""


def take_prompt_token_ids(params: Mapping[str, Any] | None) -> TokenIds | None:
    """Return the ids a prefill leg has forwarded; with them the prompt is neither templated nor tokenised."""
    ids = (params or {}).get("prompt_token_ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or not ids or any(type(token) is not int for token in ids):
        raise ApiError(
            "kv_transfer_params.prompt_token_ids must be a non-empty list of integers; "
            "send the prefill answer's prompt_token_ids unchanged",
            param=f"{FIELD}.prompt_token_ids",
        )
    try:
        return new_tokens(ids)
    except OverflowError as error:
        raise ApiError("a prompt token id is out of vocabulary", param=f"{FIELD}.prompt_token_ids") from error


def checked_type(params: object) -> Mapping[str, Any] | None:
    """Return the params if they are an object or absent.

    Raises:
        ApiError: They are something else.
    """
    if params is None or isinstance(params, dict):
        return params
    raise invalid(f"{FIELD} must be an object, got {type(params).__name__}", param=FIELD)


def read_kv_wish(params: Mapping[str, Any] | None) -> KvWish:
    """Return what the params ask for.

    Raises:
        ApiError: They are of a shape that real vLLM would not survive.
    """
    if not params:
        return KvWish()
    hold, pull = bool(params.get("do_remote_decode")), bool(params.get("do_remote_prefill"))
    if hold and not pull and params.get("remote_engine_id"):
        raise refusal(
            "remote_fields_on_prefill",
            "a prefill leg must not name a remote engine: vLLM 0.32 would hang here; "
            'send {"do_remote_decode": true} alone',
        )
    return KvWish(hold=hold, pull=_read_pull(params) if pull else None, order=read_order(params))


def refusal(reason: str, message: str) -> ApiError:
    """Return a refusal that stands for a crash, a hang or a wrong answer of real vLLM."""
    return ApiError(f"{FIELD}: {message}", param=FIELD, reason=reason)


def _read_pull(params: Mapping[str, Any]) -> PullParams:
    blocks = params.get("remote_block_ids")
    if blocks is None:
        raise refusal(
            "missing_remote_block_ids",
            "do_remote_prefill without remote_block_ids: vLLM 0.32 would crash here; "
            "send the prefill answer's params unchanged",
        )
    for name in ("remote_engine_id", "remote_request_id", "remote_host", "remote_port"):
        if params.get(name) is None:
            consequence = "hang" if name == "remote_request_id" else "fail"
            raise refusal(
                f"missing_{name}",
                f"{name} is missing: vLLM 0.32 would {consequence} here; send the prefill answer's params unchanged",
            )
    cached = params.get("remote_prefill_cached_tokens")
    return PullParams(
        block_ids=_flat_block_ids(blocks),
        engine_id=str(params["remote_engine_id"]),
        request_id=str(params["remote_request_id"]),
        host=str(params["remote_host"]),
        port=_port(params["remote_port"]),
        prefill_cached_tokens=cached if type(cached) is int else None,
    )


def _flat_block_ids(blocks: object) -> tuple[int, ...]:
    """Return the block ids of the single KV cache group, given as `[[..]]` or `[..]`."""
    groups = blocks if isinstance(blocks, list) else [None]
    flat: list[Any] = [item for group in groups for item in (group if isinstance(group, list) else [group])]
    if not flat:
        raise refusal(
            "empty_remote_block_ids",
            "remote_block_ids is empty: vLLM 0.32 would crash here (base_worker.py)",
        )
    if any(type(block) is not int for block in flat):
        raise refusal("bad_remote_block_ids", "remote_block_ids must be lists of integers")
    return tuple(flat)


def _port(port: object) -> int:
    """Return a port; vLLM takes it as text too."""
    if isinstance(port, str) and port.isdecimal():
        return int(port)
    if type(port) is int:
        return port
    raise refusal("bad_remote_port", f"remote_port must be a port number, got {port!r}")

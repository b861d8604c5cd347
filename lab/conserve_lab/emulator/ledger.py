"""What an engine has held for peers: enough to say afterwards which mistake a decode leg makes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from conserve_lab.emulator.kv_params import PullParams, refusal
from conserve_lab.emulator.language import TokenIds
from conserve_lab.emulator.language.tokens import new_tokens

_REMEMBERED_MAX: Final = 4096


class HoldState(StrEnum):
    """What became of held blocks."""

    HELD = "held"
    CLAIMED = "claimed"
    """A decode leg has named them; they are not read yet."""
    PULLED = "pulled"
    EXPIRED = "expired"


@dataclass(slots=True)
class HeldPrompt:
    """One finished request whose KV a peer may read once."""

    request_id: str
    prompt: TokenIds
    block_ids: tuple[int, ...]
    state: HoldState = HoldState.HELD
    ended_at_us: int = 0


class HoldLedger:
    """The holds of one incarnation, the ended ones included (the last few thousand).

    Args:
        total_blocks: Blocks of the engine; ids beyond are out of range.
        block_size: Tokens in a block.
    """

    def __init__(self, *, total_blocks: int, block_size: int) -> None:
        self._total_blocks = total_blocks
        self._block_size = block_size
        self._prompts: OrderedDict[str, HeldPrompt] = OrderedDict()

    def record(self, held: HeldPrompt) -> None:
        """Remember a new hold, forgetting the oldest ended ones beyond the bound."""
        self._prompts[held.request_id] = held
        while len(self._prompts) > _REMEMBERED_MAX:
            self._prompts.popitem(last=False)

    def claim(self, pull: PullParams, prompt: TokenIds, *, now_us: int) -> HeldPrompt | None:
        """Check a decode leg against what was held and claim it for this leg alone.

        Returns:
            The hold, or None when the block ids are out of range (in vLLM the transfer then fails).

        Raises:
            ApiError: The leg would make a real vLLM crash or answer wrongly.
        """
        held = self._prompts.get(pull.request_id)
        if held is None:
            raise refusal(
                "unknown_request",
                f"{pull.request_id!r} was never held here; send the prefill answer's params unchanged",
            )
        self._check_state(held, now_us=now_us)
        if any(not 0 <= block < self._total_blocks for block in pull.block_ids):
            return None
        self._check_blocks(held, pull, prompt)
        held.state = HoldState.CLAIMED
        held.prompt = new_tokens()  # only an unclaimed hold is compared with anything
        return held

    def end(self, request_id: str, state: HoldState, *, now_us: int) -> None:
        """Note that a hold is over."""
        held = self._prompts.get(request_id)
        if held is not None:
            held.state = state
            held.prompt = new_tokens()
            held.ended_at_us = now_us

    def _check_state(self, held: HeldPrompt, *, now_us: int) -> None:
        if held.state in {HoldState.CLAIMED, HoldState.PULLED}:
            raise refusal(
                "used_twice",
                "these params were already used: vLLM 0.32 would answer 200 with wrong text once the blocks are "
                "re-used; do a new prefill or send no params",
            )
        if held.state is HoldState.EXPIRED:
            ago_s = (now_us - held.ended_at_us) / 1e6
            raise refusal(
                "expired",
                f"the prefiller's lease expired {ago_s:.1f} s ago: vLLM 0.32 would answer 200 with wrong text; "
                "do a new prefill or send no params",
            )

    def _check_blocks(self, held: HeldPrompt, pull: PullParams, prompt: TokenIds) -> None:
        needed = -(-len(prompt) // self._block_size)
        if needed > len(pull.block_ids):
            raise refusal(
                "prompt_longer_than_prefill",
                f"decode prompt has {needed} blocks but only {len(pull.block_ids)} were prefilled: vLLM 0.32 would "
                "crash here (base_worker.py); both legs must send the same prompt",
            )
        if pull.block_ids != held.block_ids:
            raise refusal(
                "block_ids_changed",
                "remote_block_ids are not those of the prefill answer: vLLM 0.32 would answer 200 with wrong text",
            )
        if prompt != held.prompt:
            shared = next(
                (at for at, (ours, theirs) in enumerate(zip(prompt, held.prompt, strict=False)) if ours != theirs),
                min(len(prompt), len(held.prompt)),
            )
            raise refusal(
                "prompt_differs",
                f"decode prompt differs from the prefilled one at token {shared} (lengths {len(prompt)} and "
                f"{len(held.prompt)}): vLLM 0.32 would answer 200 with wrong text; both legs must send the same "
                "prompt, best as prompt_token_ids",
            )

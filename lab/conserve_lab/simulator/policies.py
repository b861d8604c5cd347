"""Who is compared with whom: how the fleet is cut into roles, which rule places, and who prefills which turn."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from conserve_sdk.core.settings import PRESETS


class Dispatch(StrEnum):
    """How a client finds its engines."""

    LEASE = "lease"
    """The broker's lease names them."""
    ROUND_ROBIN = "round_robin"
    """Each turn goes to the next ones: nothing stays."""
    LEAST_SESSIONS = "least_sessions"
    """The first turn goes where the fewest conversations are, and they stay; nobody asks whether there is room."""


class FollowUp(StrEnum):
    """Who prefills the append of a follow-up turn. First turns always go through the prefiller, if there is one."""

    DECODER = "decoder"
    """The decoder, on top of what it holds: ConServe, and everything without roles."""
    PREFILLER = "prefiller"
    """A prefiller, every time; only missing blocks move."""
    ESTIMATE = "estimate"
    """Whoever is estimated to be done first, turn by turn (AMPD-like)."""
    SUFFIX = "suffix"
    """A prefiller when the decoder lacks more than so many tokens, else the decoder (llm-d's rule)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One way to run a fleet.

    Attributes:
        prefill_share: of the engines, rounded, at least one; 0: every engine does both.
        preset: the broker's placement; empty: no broker.
        placement: constants of the preset that differ.
        oracle: the lease reserves from the start what the conversation will hold at its end.
        prefill_chunk, decode_chunk: `max_num_batched_tokens` per role; engines that do both take `decode_chunk`.
        long_prefill_tokens: vLLM's `long_prefill_token_threshold` on decoders and engines that do both; 0: off.
        prefiller_long_tokens: the same on prefillers.
        host_tier: KV that is evicted goes to host memory.
        prefix_caching: engines find KV of earlier requests; off as in the paper's full disaggregation.
        history_pull: a prefiller pulls from the decoder what it lacks of the history (vLLM's bidirectional transfer).
        estimate_spread: sigma of the log-normal error on each of the estimates; 0: they are right.
        suffix_tokens: the threshold of `SUFFIX`.
        flip_percent: of the follow-up turns, taken through the prefiller although they should not: a predictor that
            is wrong so often.
        kv_budget_ppm: share of an engine's KV cache that the broker is told of.
        slice_tokens: longer prompts are computed in slices of so many tokens, each a request of its own, on engines
            that take who waits by priority: short prompts first, long ones as they arrived; 0: whole.
    """

    name: str
    about: str
    dispatch: Dispatch = Dispatch.LEASE
    follow_up: FollowUp = FollowUp.DECODER
    preset: str = ""
    placement: tuple[tuple[str, Any], ...] = field(default=())
    oracle: bool = False
    prefill_share: float = 0.0
    prefill_chunk: int = 8192
    decode_chunk: int = 2944
    long_prefill_tokens: int = 0
    prefiller_long_tokens: int = 0
    host_tier: bool = False
    prefix_caching: bool = True
    history_pull: bool = False
    estimate_spread: float = 0.0
    suffix_tokens: int = 0
    flip_percent: int = 0
    kv_budget_ppm: int = 1_000_000
    slice_tokens: int = 0

    def prefillers(self, engines: int) -> int:
        """How many of `engines` are prefillers."""
        if not self.prefill_share:
            return 0
        return min(max(round(self.prefill_share * engines), 1), engines - 1)

    def with_chunks(self, *, decode: int, prefill: int | None = None) -> Policy:
        """The same with other chunks; only policies with prefillers have two."""
        name = f"{self.name}@{decode}" if prefill is None else f"{self.name}@{prefill}/{decode}"
        return replace(self, name=name, decode_chunk=decode, prefill_chunk=prefill or self.prefill_chunk)


SWEPT_CHUNKS = (512, 1024, 2944, 8192)
_QUARTER = 0.25
_PAPER_BUDGET_PPM = 886_700
"""The published code admits against 308 448 of an A40's 347 872 tokens."""

_PAPER = Policy(
    name="paper",
    about="ConServe as published, its reservation growing with the conversation: first turn on the prefiller, always",
    preset="paper",
    prefill_share=_QUARTER,
    prefill_chunk=2944,
    kv_budget_ppm=_PAPER_BUDGET_PPM,
)
_EVERY_TURN = Policy(
    name="pd-sticky",
    about="disaggregated every turn, engines stay, only missing blocks move, admission",
    follow_up=FollowUp.PREFILLER,
    preset="paper",
    prefill_share=_QUARTER,
)
_FINE: dict[str, Any] = {"decode_chunk": 768, "long_prefill_tokens": 384}
"""Steps of 768 tokens, of which one long prompt takes 384 at most: short ones pass it, or another long one."""
_A0 = Policy(name="a0", about="aggregated, session affinity with lease-accounted admission", preset="affinity")

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(name="round-robin", about="aggregated, each turn on the next engine", dispatch=Dispatch.ROUND_ROBIN),
        Policy(
            name="router-sticky",
            about="aggregated, sticky and least loaded without admission, as vllm-router in regular mode",
            dispatch=Dispatch.LEAST_SESSIONS,
        ),
        _A0,
        replace(_A0, name="a0-host", about="a0 with a host KV tier", host_tier=True),
        replace(
            _A0,
            name="a2",
            about="a0 with vLLM's long-prefill threshold and a host KV tier: the strongest reference",
            long_prefill_tokens=512,
            host_tier=True,
        ),
        replace(
            _A0,
            name="a2-fine",
            about="a2 on engines set as those of default: what of a gain is the engines', and not placement's",
            host_tier=True,
            **_FINE,
        ),
        Policy(
            name="pd-round-robin",
            about="disaggregated every turn, both engines chosen round robin",
            dispatch=Dispatch.ROUND_ROBIN,
            follow_up=FollowUp.PREFILLER,
            prefill_share=_QUARTER,
        ),
        replace(
            _EVERY_TURN,
            name="pd-full",
            about="disaggregated every turn without a prefix cache: the paper's full disaggregation",
            prefill_chunk=2944,
            prefix_caching=False,
            kv_budget_ppm=_PAPER_BUDGET_PPM,
        ),
        _EVERY_TURN,
        replace(
            _EVERY_TURN,
            name="pd-history",
            about="pd-sticky whose prefiller pulls the history from the decoder (bidirectional transfer)",
            history_pull=True,
        ),
        Policy(
            name="router-pd",
            about="disaggregated every turn, sticky and least loaded without admission, as vllm-router in PD mode",
            dispatch=Dispatch.LEAST_SESSIONS,
            follow_up=FollowUp.PREFILLER,
            prefill_share=_QUARTER,
        ),
        replace(
            _EVERY_TURN,
            name="suffix",
            about="the prefiller when more than 1024 tokens are not cached on the decoder, else the decoder (llm-d)",
            follow_up=FollowUp.SUFFIX,
            suffix_tokens=1024,
        ),
        replace(
            _EVERY_TURN,
            name="ampd",
            about="each turn where it is estimated to be done first, estimates right (AMPD-like)",
            follow_up=FollowUp.ESTIMATE,
            history_pull=True,
        ),
        replace(
            _EVERY_TURN,
            name="ampd-error",
            about="the same with log-normal errors of sigma 1 on the estimates",
            follow_up=FollowUp.ESTIMATE,
            history_pull=True,
            estimate_spread=1.0,
        ),
        replace(
            _PAPER,
            name="ampd-10",
            about="the paper's rule with one follow-up turn in ten sent to the prefiller by mistake (AMPD-like)",
            flip_percent=10,
        ),
        _PAPER,
        replace(
            _PAPER,
            name="paper-oracle",
            about="the same, reserving from the start what the conversation will hold at its end",
            oracle=True,
        ),
        Policy(
            name="default",
            about="ConServe with the observed-state score and a host KV tier",
            preset="default",
            prefill_share=_QUARTER,
            prefill_chunk=768,
            prefiller_long_tokens=384,
            host_tier=True,
            **_FINE,
        ),
    )
}
POLICIES["sliced"] = replace(
    POLICIES["default"],
    name="sliced",
    about="default with long prompts computed in slices, on engines of steps of 512 that take short ones first",
    slice_tokens=8_192,
    prefill_chunk=512,
    decode_chunk=512,
    long_prefill_tokens=0,
    prefiller_long_tokens=0,
)
"""By name. Every policy with a preset has the same lease-accounted admission."""

assert all(policy.preset in {"", *PRESETS} for policy in POLICIES.values())

"""Who is compared with whom: how the fleet is cut into roles, which rule places, and who prefills which turn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from conserve_sdk.core.settings import PRESETS


class Dispatch(StrEnum):
    """How a client finds the engines of a turn."""

    LEASE = "lease"
    """ConServe: the lease's prefiller for its one migration, its decoder for everything."""
    EVERY_TURN = "every_turn"
    """Disaggregation turn by turn: a prefiller for every turn, a decoder that stays; only missing blocks move."""
    EVERY_TURN_ANYWHERE = "every_turn_anywhere"
    """The same, with both engines chosen anew, round robin: nothing stays."""
    ROUND_ROBIN = "round_robin"
    """No roles: each turn on the next engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One way to run a fleet.

    Attributes:
        prefill_share: of the engines, rounded, at least one; 0: every engine does both.
        preset: the broker's placement; empty: no broker.
        prefill_chunk, decode_chunk: `max_num_batched_tokens` per role; engines that do both take `decode_chunk`.
        long_prefill_tokens: vLLM's `long_prefill_token_threshold` on decoders and engines that do both; 0: off.
        host_tier: KV that is evicted goes to host memory.
        prefix_caching: engines find KV of earlier requests; off as in the paper's full disaggregation.
        flip_percent: of the follow-up turns, taken through the prefiller although they should not: a predictor that
            is wrong so often.
        kv_budget_ppm: share of an engine's KV cache that the broker is told of.
    """

    name: str
    about: str
    dispatch: Dispatch = Dispatch.LEASE
    preset: str = ""
    prefill_share: float = 0.0
    prefill_chunk: int = 8192
    decode_chunk: int = 2944
    long_prefill_tokens: int = 0
    host_tier: bool = False
    prefix_caching: bool = True
    flip_percent: int = 0
    kv_budget_ppm: int = 1_000_000

    def prefillers(self, engines: int) -> int:
        """How many of `engines` are prefillers."""
        if not self.prefill_share:
            return 0
        return min(max(round(self.prefill_share * engines), 1), engines - 1)

    def with_chunk(self, tokens: int) -> Policy:
        """The same with another chunk on the engines that decode."""
        return replace(self, name=f"{self.name}@{tokens}", decode_chunk=tokens)


_QUARTER = 0.25
_PAPER_BUDGET_PPM = 886_700
"""The published code admits against 308 448 of an A40's 347 872 tokens."""

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(name="round-robin", about="aggregated, each turn on the next engine", dispatch=Dispatch.ROUND_ROBIN),
        Policy(name="a0", about="aggregated, session affinity with lease-accounted admission", preset="affinity"),
        Policy(
            name="a2",
            about="a0 with vLLM's long-prefill threshold and a host KV tier: the strongest reference",
            preset="affinity",
            long_prefill_tokens=512,
            host_tier=True,
        ),
        Policy(
            name="pd-round-robin",
            about="disaggregated every turn, both engines chosen round robin",
            dispatch=Dispatch.EVERY_TURN_ANYWHERE,
            prefill_share=_QUARTER,
        ),
        Policy(
            name="pd-full",
            about="disaggregated every turn without a prefix cache: the paper's full disaggregation",
            dispatch=Dispatch.EVERY_TURN,
            preset="paper",
            prefill_share=_QUARTER,
            prefill_chunk=2944,
            prefix_caching=False,
            kv_budget_ppm=_PAPER_BUDGET_PPM,
        ),
        Policy(
            name="ampd-10",
            about="the paper's rule with one follow-up turn in ten sent to the prefiller by mistake (AMPD-like)",
            preset="paper",
            prefill_share=_QUARTER,
            prefill_chunk=2944,
            flip_percent=10,
            kv_budget_ppm=_PAPER_BUDGET_PPM,
        ),
        Policy(
            name="pd-sticky",
            about="disaggregated every turn, engines stay, only missing blocks move, admission",
            dispatch=Dispatch.EVERY_TURN,
            preset="paper",
            prefill_share=_QUARTER,
        ),
        Policy(
            name="paper",
            about="ConServe as published: first turn on the prefiller, always",
            preset="paper",
            prefill_share=_QUARTER,
            prefill_chunk=2944,
            kv_budget_ppm=_PAPER_BUDGET_PPM,
        ),
        Policy(
            name="default",
            about="ConServe with the observed-state score and a host KV tier",
            preset="default",
            prefill_share=_QUARTER,
            decode_chunk=512,
            host_tier=True,
        ),
    )
}
"""By name. Every policy with a preset has the same lease-accounted admission."""

assert all(policy.preset in {"", *PRESETS} for policy in POLICIES.values())

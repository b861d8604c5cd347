"""What an engine can hold and how fast it is."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate

_US_PER_S = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """How long one forward step takes.

    Decodes and prefill chunks share one step, which is why a long prefill stretches the time between tokens of
    every decode beside it::

        max(floor, base + context + prefill + attention) + sequences

    The defaults are a mid-range GPU with a small model, not a measurement.
    """

    base_us: int = 18_000
    """Fixed cost of a step: launch overhead and one read of the weights."""
    floor_us: int = 0
    """No step is shorter: what the host needs to prepare one, which a short step cannot hide."""
    decode_us_per_sequence: int = 100
    decode_ns_per_context_token: int = 30
    """Cost of reading one token of KV cache in attention."""
    prefill_tokens_per_s: int = 20_000
    prefill_attention_ps_per_pair: int = 0
    """Cost of one (new token, earlier token) pair: what makes the prefill of a long prompt quadratic."""

    def step_us(self, *, decodes: int, context_tokens: int, prefill_tokens: int, prefill_pairs: int = 0) -> int:
        """Return the microseconds of a step with this work in it; 0 when there is none.

        Args:
            decodes: sequences that get one token each.
            context_tokens: tokens of KV that they read.
            prefill_tokens: prompt tokens computed.
            prefill_pairs: pairs of a prompt token and one at or before it in its sequence.
        """
        if not decodes and not prefill_tokens:
            return 0
        work_us = (
            self.base_us
            + self.decode_ns_per_context_token * context_tokens // 1000
            + prefill_tokens * _US_PER_S // self.prefill_tokens_per_s
            + self.prefill_attention_ps_per_pair * prefill_pairs // _US_PER_S
        )
        return max(self.floor_us, work_us) + self.decode_us_per_sequence * decodes

    def decode_steps_us(self, *, decodes: int, context_tokens: int, steps: int, within_us: int) -> list[int]:
        """Return `step_us` of up to `steps` steps of nothing but decodes, each of which reads `decodes` tokens more.

        Args:
            decodes: sequences, the same in all steps, at least one.
            context_tokens: what the first step reads.
            steps: how many at most.
            within_us: the last of them begins before so much time has passed.
        """
        if steps < 1 or within_us < 1:
            return []
        floor_us, base_us, per_token_ns = self.floor_us, self.base_us, self.decode_ns_per_context_token
        sequences_us = self.decode_us_per_sequence * decodes
        shortest_us = max(floor_us, base_us + per_token_ns * context_tokens // 1000) + sequences_us
        most = min(steps, -(-within_us // shortest_us)) if shortest_us else steps  # steps only get longer
        contexts = range(context_tokens, context_tokens + most * decodes, decodes)
        base_us += sequences_us
        durations = [base_us + per_token_ns * context // 1000 for context in contexts]
        floored = bisect_left(durations, floor_us + sequences_us)
        durations[:floored] = [floor_us + sequences_us] * floored
        del durations[bisect_left(list(accumulate(durations)), within_us) + 1 :]
        return durations


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCost:
    """How long KV blocks take over the link between two engines."""

    kv_bytes_per_token: int = 131_072
    """bf16 Llama-3.1-8B: 2 x 32 layers x 8 KV heads x 128 x 2 bytes."""
    bytes_per_s: int = 25_000_000_000
    overhead_us: int = 5_000

    def bytes_of(self, tokens: int) -> int:
        """Return the bytes of KV cache that `tokens` occupy."""
        return tokens * self.kv_bytes_per_token

    def transfer_us(self, tokens: int) -> int:
        """Return the microseconds the link is busy moving `tokens`."""
        return self.overhead_us + self.bytes_of(tokens) * _US_PER_S // self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModelConfig:
    """Sizes and limits of one engine, under the names of vLLM's own options.

    Raises:
        ValueError: A size is not positive.
    """

    block_size: int = 16
    kv_blocks: int = 4096
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0
    """Most prompt tokens of one request in one step while there are others; 0 means only the batch limit counts."""
    priority_scheduling: bool = False
    """vLLM's `--scheduling-policy priority`: who waits is taken by priority, then by arrival; else by arrival alone."""
    kv_lease_us: int = 30_000_000
    """How long a finished request's blocks are held for a peer (vLLM's `kv_lease_duration`)."""
    enable_prefix_caching: bool = True
    host_blocks: int = 0
    """Blocks that fit into the host tier; 0: none."""
    cost: StepCost = field(default_factory=StepCost)

    def __post_init__(self) -> None:
        for name in ("block_size", "kv_blocks", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that fit into the KV cache."""
        return self.kv_blocks * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that `tokens` occupy."""
        return -(-tokens // self.block_size)

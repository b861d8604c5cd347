"""What the broker learns from observation: tokens per byte of a model's prompts, and engines' prefill rates.

Integer exponential averages. Samples that say nothing about the quantity (tiny prompts measure overhead) are left
out, and every sample is clamped, so that one absurd report cannot move a decision far.
"""

from __future__ import annotations

from conserve_sdk.core.units import MILLION, ModelName, Ms, Ppm, Tokens

START_TOKENS_PER_BYTE_PPM = Ppm(250_000)
"""Four bytes a token until a model's prompts were seen."""

SAMPLE_MIN_TOKENS = 256
"""Smaller prefills measure an engine's latency, not its rate."""
SAMPLE_MIN_BYTES = 256

_RATIO_BOUNDS_PPM = (10_000, 2_000_000)
_RATE_MAX_TOKENS_PER_S = 10_000_000


def _clamped(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


class TokensPerByte:
    """Tokens per byte of prompt text, by model, in parts per million."""

    def __init__(self) -> None:
        self._ppm: dict[ModelName, int] = {}

    def ppm(self, model: ModelName) -> Ppm:
        """The ratio in use for a model."""
        return Ppm(self._ppm.get(model, START_TOKENS_PER_BYTE_PPM))

    def learn(self, model: ModelName, *, prompt_tokens: Tokens, prompt_bytes: int) -> None:
        """Take one prompt whose two sizes are both known; a new sample weighs an eighth."""
        if prompt_tokens == 0 or prompt_bytes < SAMPLE_MIN_BYTES:
            return
        sample = _clamped(prompt_tokens * MILLION // prompt_bytes, *_RATIO_BOUNDS_PPM)
        self._ppm[model] = (7 * self.ppm(model) + sample) // 8

    def tokens(self, model: ModelName, prompt_bytes: int) -> Tokens:
        """Estimate, rounded up."""
        return Tokens(-(-prompt_bytes * self.ppm(model) // MILLION))


def averaged_share_ppm(share_ppm: int, *, sample_ppm: int, span_ms: int, window_ms: int) -> Ppm:
    """An exponential average over time after one more sample that held for `span_ms`; whole parts per million.

    The weight `span / (window + span)` never exceeds 1, whatever the time between two samples.
    """
    sample = _clamped(sample_ppm, 0, MILLION)
    return Ppm((share_ppm * window_ms + sample * span_ms) // (window_ms + span_ms))


def averaged_rate(rate_tokens_per_s: int, *, tokens: int, took_ms: Ms) -> int:
    """A prefill rate after one more sample, which weighs a quarter; the first one counts in full.

    Args:
        rate_tokens_per_s: the average so far; 0 when there is none.
        tokens: tokens prefilled; fewer than `SAMPLE_MIN_TOKENS` are ignored.
        took_ms: in this time; 0 for unknown.
    """
    if took_ms == 0 or tokens < SAMPLE_MIN_TOKENS:
        return rate_tokens_per_s
    sample = _clamped(tokens * 1_000 // took_ms, 1, _RATE_MAX_TOKENS_PER_S)
    return sample if rate_tokens_per_s == 0 else (3 * rate_tokens_per_s + sample) // 4

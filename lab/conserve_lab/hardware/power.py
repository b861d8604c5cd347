"""How much power a step draws: idle, plus a share of the rest that grows with memory and compute traffic."""

from __future__ import annotations

from dataclasses import dataclass

from conserve_lab.engine_model import StepCost

_BASE_PPM, _MEMORY_PPM, _COMPUTE_PPM = 350_000, 450_000, 650_000
_MILLION = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerModel:
    """Power of one engine.

    Fitted to the totals of the A40 runs of eicchen/conserve, and only to those: absolute joules of other GPUs are
    assumptions, ratios between policies on one GPU are less so.

    Attributes:
        idle_mw: drawn all the time.
        full_mw: drawn at full load without a cap.
        cap_mw: what it is limited to. A limit saves nothing in a step that would draw less; what it costs in speed is
            in the engine's own figures.
        weights_us: the part of a step's base cost in which the weights are read.
    """

    idle_mw: int
    full_mw: int
    cap_mw: int
    weights_us: int

    def step_nj(
        self, cost: StepCost, *, duration_us: int, steps: int, context_tokens: int, prefill_tokens: int, pairs: int
    ) -> int:
        """Return the energy above idle, in nanojoules, of `steps` steps that took `duration_us` together.

        Args:
            cost: what the work of a step takes.
            duration_us: of all the steps.
            steps: how many.
            context_tokens: KV read, summed over the steps.
            prefill_tokens: prompt tokens computed.
            pairs: of prefill attention.
        """
        if not duration_us:
            return 0
        memory_us = self.weights_us * steps + cost.decode_ns_per_context_token * context_tokens // 1000
        compute_us = (
            prefill_tokens * _MILLION // cost.prefill_tokens_per_s
            + cost.prefill_attention_ps_per_pair * pairs // _MILLION
        )
        load_ppm = _BASE_PPM + (_MEMORY_PPM * memory_us + _COMPUTE_PPM * compute_us) // duration_us
        drawn_mw = self.idle_mw + (self.full_mw - self.idle_mw) * min(load_ppm, _MILLION) // _MILLION
        return duration_us * (min(drawn_mw, self.cap_mw) - self.idle_mw)

    def idle_nj(self, span_us: int) -> int:
        """Return what it draws in `span_us` without doing anything, in nanojoules."""
        return span_us * self.idle_mw

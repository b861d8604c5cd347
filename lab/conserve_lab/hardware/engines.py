"""Engines: a GPU with a model on it. Calibrated where somebody measured, else a roofline that says so."""

from __future__ import annotations

from dataclasses import dataclass

from conserve_lab.engine_model import StepCost, TransferCost
from conserve_lab.hardware.gpus import GPUS, Gpu
from conserve_lab.hardware.models import MODELS, Model
from conserve_lab.hardware.power import PowerModel

_LINK_BYTES_PER_S = 25_000_000_000
_LINK_OVERHEAD_US = 20_000
_MEMORY_SHARE = 0.9
"""vLLM's `gpu_memory_utilization`."""

# Efficiencies of the roofline, within what vLLM reaches on dense models of this size; not measured here.
_MBU, _MFU_LINEAR, _MFU_ATTENTION = 0.80, 0.55, 0.50
_FLOOR_US, _OVERHEAD_US, _SEQUENCE_US, _FRONT_US = 8_000, 2_000, 24, 25_000


class UnknownEngine(ValueError):  # noqa: N818 -- says what happened
    """No such engine; the message names those there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """All that the simulator needs to know of an engine.

    Attributes:
        calibrated: whether `cost` was fitted to measurements of this very combination.
        source: of the speeds.
        front_us: from a request's arrival to the scheduler.
        kv_tokens: capacity of the KV cache.
    """

    name: str
    calibrated: bool
    source: str
    cost: StepCost
    front_us: int
    kv_tokens: int
    transfer: TransferCost
    power: PowerModel


_A40_SOURCE = "fitted to 101 decode and 19 prefill cells of eicchen/conserve (vLLM 0.11, Qwen3-0.6B, A40, eager mode)"


def _a40_qwen(name: str, *, cap_w: int, prefill_tokens_per_s: int, attention_ps: int, front_us: int) -> EngineKind:
    model, gpu = MODELS["qwen3-0.6b"], GPUS["a40"]
    return EngineKind(
        name=name,
        calibrated=True,
        source=f"{_A40_SOURCE}, {cap_w} W",
        cost=StepCost(
            base_us=6_022,
            floor_us=13_842,
            decode_us_per_sequence=37,
            decode_ns_per_context_token=183,
            prefill_tokens_per_s=prefill_tokens_per_s,
            prefill_attention_ps_per_pair=attention_ps,
        ),
        front_us=front_us,
        kv_tokens=347_872,
        transfer=_transfer(model),
        power=_power(gpu, model, cap_w=cap_w, mbu=0.89),
    )


def _transfer(model: Model) -> TransferCost:
    return TransferCost(
        kv_bytes_per_token=model.kv_bytes_per_token, bytes_per_s=_LINK_BYTES_PER_S, overhead_us=_LINK_OVERHEAD_US
    )


def _power(gpu: Gpu, model: Model, *, cap_w: int, mbu: float) -> PowerModel:
    weights_us = round(model.weight_bytes / (gpu.memory_gb_per_s * 1e3 * mbu))
    return PowerModel(idle_mw=gpu.idle_w * 1000, full_mw=gpu.cap_w * 1000, cap_mw=cap_w * 1000, weights_us=weights_us)


CALIBRATED: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (
        _a40_qwen("a40/qwen3-0.6b", cap_w=300, prefill_tokens_per_s=63_064, attention_ps=2_671, front_us=31_121),
        _a40_qwen("a40@200w/qwen3-0.6b", cap_w=200, prefill_tokens_per_s=64_544, attention_ps=3_987, front_us=26_153),
    )
}
"""Engines whose speeds were measured. The 200 W decode cells do not exist: measured decode at 200 W is 2 % slower."""


def engine_kind(name: str) -> EngineKind:
    """Return the engine `GPU/MODEL`, such as `a40/qwen3-0.6b` or `h100/qwen3-32b`.

    Raises:
        UnknownEngine: an unknown GPU or model, or one that does not hold the other.
    """
    if name in CALIBRATED:
        return CALIBRATED[name]
    gpu_name, _, model_name = name.partition("/")
    gpu, model = GPUS.get(gpu_name), MODELS.get(model_name)
    if gpu is None or model is None:
        known = ", ".join([*CALIBRATED, *(f"{gpu}/{model}" for gpu in GPUS for model in MODELS)])
        raise UnknownEngine(f"unknown engine {name!r}: choose one of {known}")
    return _roofline(name, gpu, model)


def _roofline(name: str, gpu: Gpu, model: Model) -> EngineKind:
    free_bytes = gpu.memory_gb * 1e9 * _MEMORY_SHARE - model.weight_bytes
    if free_bytes <= 0:
        raise UnknownEngine(f"{model.name} needs {model.weight_bytes / 1e9:.0f} GB, a {gpu.name} has {gpu.memory_gb}")
    bytes_per_us = gpu.memory_gb_per_s * 1e3 * _MBU
    flops_per_us = gpu.tflops * 1e6
    return EngineKind(
        name=name,
        calibrated=False,
        source=f"roofline, not calibrated: {gpu.source}",
        cost=StepCost(
            floor_us=_FLOOR_US,
            base_us=_OVERHEAD_US + round(model.weight_bytes / bytes_per_us),
            decode_us_per_sequence=_SEQUENCE_US,
            decode_ns_per_context_token=round(model.kv_bytes_per_token / bytes_per_us * 1e3),
            prefill_tokens_per_s=round(flops_per_us * _MFU_LINEAR * 1e6 / (2 * model.parameters)),
            prefill_attention_ps_per_pair=round(
                4 * model.layers * model.hidden / (flops_per_us * _MFU_ATTENTION) * 1e6
            ),
        ),
        front_us=_FRONT_US,
        kv_tokens=int(free_bytes / model.kv_bytes_per_token),
        transfer=_transfer(model),
        power=_power(gpu, model, cap_w=gpu.cap_w, mbu=_MBU),
    )

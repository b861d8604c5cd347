"""GPUs by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        tflops: dense bf16.
        memory_gb_per_s: bandwidth of its memory.
        memory_gb: its size.
        cap_w: power limit as sold.
        idle_w: with a model loaded and nothing to do.
        source: where the figures come from.
    """

    name: str
    tflops: float
    memory_gb_per_s: int
    memory_gb: int
    cap_w: int
    idle_w: int
    source: str


_IDLE = "; idle power assumed"

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a40", tflops=149.7, memory_gb_per_s=696, memory_gb=48, cap_w=300, idle_w=76,
            source="NVIDIA's data sheet; idle power from the dcgmi logs of eicchen/conserve",
        ),
        Gpu(
            name="a100", tflops=312, memory_gb_per_s=2039, memory_gb=80, cap_w=400, idle_w=60,
            source="NVIDIA's data sheet (SXM 80 GB)" + _IDLE,
        ),
        Gpu(
            name="h100", tflops=989, memory_gb_per_s=3350, memory_gb=80, cap_w=700, idle_w=80,
            source="NVIDIA's data sheet (SXM)" + _IDLE,
        ),
        Gpu(
            name="l40s", tflops=362, memory_gb_per_s=864, memory_gb=48, cap_w=350, idle_w=60,
            source="NVIDIA's data sheet" + _IDLE,
        ),
        Gpu(
            name="l4", tflops=121, memory_gb_per_s=300, memory_gb=24, cap_w=72, idle_w=17,
            source="NVIDIA's data sheet" + _IDLE,
        ),
    )
}  # fmt: skip

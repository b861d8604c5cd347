"""What one demo runs: sizes by engine, and the choices of the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

EngineKind = Literal["emulated", "vllm"]
Preset = Literal["default", "paper", "affinity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sizes of the conversations.

    Attributes:
        prompt_chars: shortest and longest first user message; long enough that moving its KV is worth it.
        arrivals_s: time over which the conversations arrive.
        turns: fewest and most turns of a conversation.
        answer_tokens: most tokens of one answer; 0: as many as the model wants.
    """

    conversations: int
    prompt_chars: tuple[int, int]
    arrivals_s: float
    turns: tuple[int, int]
    answer_tokens: int = 0


WORKLOADS: dict[EngineKind, Workload] = {
    "emulated": Workload(conversations=24, prompt_chars=(10_000, 18_000), arrivals_s=3.0, turns=(3, 12)),
    # A CPU prefills some ten thousand tokens a second of the tiny model and decodes one stream at 200 a second.
    "vllm": Workload(conversations=8, prompt_chars=(3_000, 4_500), arrivals_s=2.0, turns=(3, 6), answer_tokens=24),
}


DEFAULT_PRESETS: dict[EngineKind, Preset] = {
    "emulated": "default",
    # On one shared CPU a prefiller is no faster than a decoder, and the score would rightly move little. What the real
    # engines are to show is the move itself, so there every first turn is prefilled on the prefiller.
    "vllm": "paper",
}


BUDGETS_S: dict[EngineKind, float] = {"emulated": 180.0, "vllm": 600.0}
"""Many times what a run takes on an idle machine of two CPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """One `conserve demo`.

    Attributes:
        comparisons: also run the workload per turn and with affinity.
        vllm_venv: environment that holds vLLM, None for the default place.
        time_scale: multiplies every duration of emulated engines; 0: as fast as the machine can.
        budget_s: longest time one of the runs may take before it counts as hanging.
    """

    engine: EngineKind
    preset: Preset
    seed: int
    workload: Workload
    plain: bool = False
    comparisons: bool = True
    json_path: Path | None = None
    vllm_venv: Path | None = None
    time_scale: float = 1.0
    budget_s: float


def demo_settings(
    engine: EngineKind,
    *,
    conversations: int | None = None,
    preset: Preset | None = None,
    seed: int = 1,
    plain: bool = False,
    comparisons: bool = True,
    json_path: Path | None = None,
    vllm_venv: Path | None = None,
    time_scale: float = 1.0,
) -> DemoSettings:
    """Return the settings for an engine, with its own sizes and preset where the caller gives none."""
    workload = WORKLOADS[engine]
    if conversations is not None:
        share = conversations / workload.conversations  # the same arrivals a second
        workload = replace(workload, conversations=conversations, arrivals_s=workload.arrivals_s * share)
    if engine == "emulated":
        workload = replace(workload, arrivals_s=workload.arrivals_s * time_scale)
    return DemoSettings(
        engine=engine,
        preset=preset or DEFAULT_PRESETS[engine],
        seed=seed,
        workload=workload,
        plain=plain,
        comparisons=comparisons,
        json_path=json_path,
        vllm_venv=vllm_venv,
        time_scale=time_scale,
        budget_s=BUDGETS_S[engine],
    )

"""The paper's experiment in virtual time, under both ways to count, beside what it published.

One prefiller and three decoders (or four engines that do both), A40 with Qwen3-0.6B, 255 conversations of five turns,
0.5 to 1.634 conversations/s, decoders at 300 W and at 200 W.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from conserve_lab.hardware import engine_kind
from conserve_lab.simulator import published
from conserve_lab.simulator.compare import Cell, conversations_of
from conserve_lab.simulator.policies import POLICIES, Policy
from conserve_lab.simulator.run import simulate
from conserve_lab.simulator.summary import summarise

LOADS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.634)
SATURATION = 1.634
CONVERSATIONS, TURNS, ENGINES = 255, 5, 4
GPU, CAPPED_GPU = "a40/qwen3-0.6b", "a40@200w/qwen3-0.6b"

SYSTEMS: Mapping[str, Policy] = {
    "collocated": POLICIES["a0"],
    "full-disaggregation": POLICIES["pd-full"],
    "ampd": POLICIES["ampd-10"],
    "conserve": POLICIES["paper"],
    "conserve-default": POLICIES["default"],
    "a2": POLICIES["a2"],
}
"""The paper's four under its names, then ours and the strongest reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRun:
    """One run. `capped`: decoders (of the collocated: all engines) at 200 W."""

    system: str
    per_s: float
    seed: int
    workload: str
    capped: bool = False


def paper_runs(*, workload: str, seeds: range) -> list[PaperRun]:
    """Every run of the experiment: all systems at all loads, and at saturation with the cap too."""
    plain = [
        PaperRun(system=system, per_s=per_s, seed=seed, workload=workload)
        for system in SYSTEMS
        for per_s in LOADS
        for seed in seeds
    ]
    return plain + [replace(run, capped=True) for run in plain if run.per_s == SATURATION]


def run_one(run: PaperRun) -> dict[str, Any]:
    """Simulate one of them."""
    policy = SYSTEMS[run.system]
    decoder = engine_kind(CAPPED_GPU if run.capped else GPU)
    prefillers = policy.prefillers(ENGINES)
    kinds = [engine_kind(GPU)] * prefillers + [decoder] * (ENGINES - prefillers)
    cell = Cell(workload=run.workload, per_s=run.per_s, conversations=CONVERSATIONS, turns_max=TURNS)
    outcome = simulate(conversations_of(cell, seed=run.seed), policy, kinds, per_s=run.per_s, seed=run.seed)
    return summarise(outcome)


def run_paper(runs: Sequence[PaperRun], *, processes: int, advance: Callable[[], None]) -> dict[str, Any]:
    """Run the experiment and lay its figures beside the published ones.

    Returns:
        Per accounting (`artifact`, `arrival`) its `rows` and `headline`.
    """
    found: dict[tuple[str, float, bool], list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(processes) as pool:
        for run, figures in zip(runs, pool.map(run_one, runs), strict=True):
            found.setdefault((run.system, run.per_s, run.capped), []).append(figures)
            advance()
    medians = {key: _median(figures) for key, figures in found.items()}
    return {
        accounting: {
            "rows": [_row(accounting, key, figures) for key, figures in medians.items()],
            "headline": _headline(accounting, medians),
        }
        for accounting in ("artifact", "arrival")
    }


def _median(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _key(accounting: str, name: str) -> str:
    return f"artifact_{name}" if accounting == "artifact" else name


def _row(accounting: str, key: tuple[str, float, bool], figures: Mapping[str, Any]) -> dict[str, Any]:
    system, per_s, capped = key
    row: dict[str, Any] = {"system": system, "load": per_s, "decoder_w": 200 if capped else 300}
    measured = {
        "ttfet_p95_norm": (figures[_key(accounting, "ttfet_p95_norm")], published.TTFET_P95_NORM),
        "tbt_p95_norm": (figures["tbt_p95_norm"], published.TBT_P95_NORM),
        "e2e_p95_norm": (figures[_key(accounting, "e2e_p95_norm")], published.E2E_P95_NORM),
        "tokens_per_joule": (figures["tokens_per_joule"], published.TOKENS_PER_JOULE),
    }
    for name, (value, figure) in measured.items():
        row[name] = value
        told = figure.get(system, {}).get(per_s) if not capped else None
        if capped and name == "tokens_per_joule":
            told = published.TOKENS_PER_JOULE_200W.get(system)
        row[f"{name}_published"] = told
        row[f"{name}_error_pct"] = None if told is None else round((value / told - 1) * 100, 1)
    row["ttfet_gmean_norm"] = figures[_key(accounting, "ttfet_gmean_norm")]
    row["tbt_p99_ms"] = figures["tbt_p99_ms"]
    row["slo_violations"] = figures["slo_violations"]
    return row


def _headline(accounting: str, medians: Mapping[tuple[str, float, bool], Mapping[str, Any]]) -> dict[str, Any]:
    ours, theirs = medians["conserve", SATURATION, False], medians["ampd", SATURATION, False]
    capped = medians["conserve", SATURATION, True]
    ttfet = _key(accounting, "ttfet_p95_norm")
    values = {
        "ttfet_p95_reduction_pct": (1 - ours[ttfet] / theirs[ttfet]) * 100,
        "tokens_per_joule_gain_pct": (ours["tokens_per_joule"] / theirs["tokens_per_joule"] - 1) * 100,
        "heterogeneous_gain_pct": (capped["tokens_per_joule"] / ours["tokens_per_joule"] - 1) * 100,
    }
    return {name: round(value, 2) for name, value in values.items()} | {"published": dict(published.HEADLINE)}

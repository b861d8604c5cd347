"""`conserve bench`: every preset and the per-turn baseline on the same workloads, over several seeds."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from conserve_lab.demo.figures import Variant, figures
from conserve_lab.demo.fleets import EmulatedSource
from conserve_lab.demo.settings import DemoSettings, Preset, demo_settings
from conserve_lab.demo.tasks import make_tasks
from conserve_lab.demo.trial import Trial, run_trial

Figures = Mapping[str, Any]
Values = Sequence[float | None]

POLICIES: Mapping[str, tuple[Variant, Preset]] = {
    "default": (Variant.CONSERVE, "default"),
    "paper": (Variant.CONSERVE, "paper"),
    "affinity": (Variant.AFFINITY, "affinity"),
    "per turn": (Variant.PER_TURN, "paper"),
}
"""What is compared: the variant that chooses engines and planner, and the broker's preset."""

ROWS: Mapping[str, Callable[[Figures], float | None]] = {
    "TTFET p50 ms": lambda found: found["ttfet_ms"]["p50"],
    "TTFET p95 ms": lambda found: found["ttfet_ms"]["p95"],
    "TTFT p50 ms": lambda found: found["ttft_ms"]["p50"],
    "TTFT p95 ms": lambda found: found["ttft_ms"]["p95"],
    "TBT p50 ms": lambda found: found["tbt_ms"]["p50"],
    "TBT p95 ms": lambda found: found["tbt_ms"]["p95"],
    "TBT p99 ms": lambda found: found["tbt_ms"]["p99"],
    "KV transfers": lambda found: found["migrations"],
    "tokens of KV moved": lambda found: found["moved_tokens"],
    "moves by a new lease": lambda found: found["re_leases"],
    "follow-ups on a prefiller": lambda found: found["follow_up_turns_on_prefiller"],
    "follow-up cache share %": lambda found: _percent(found["follow_up_cached_token_share"]),
    "run s": lambda found: found["elapsed_s"],
    "broker CPU ms per conversation": lambda found: found["broker_cpu_ms_per_conversation"],
    "machine lag ms": lambda found: found["machine_lag_ms"],
    "errors": lambda found: found["errors"],
}


def run_bench(
    *,
    seeds: Iterable[int],
    conversations: int,
    json_path: Path,
    markdown_path: Path,
    console: Console,
    time_scale: float = 1.0,
) -> int:
    """Run everything, print the table, write both files.

    Returns:
        0, or 1 when a run had errors.

    Raises:
        DemoError: a run could not be made at all.
        OSError: a file cannot be written.
    """
    results: dict[str, list[Figures]] = {policy: [] for policy in POLICIES}
    with EmulatedSource(time_scale=time_scale) as source:
        for seed, (policy, (variant, preset)) in itertools.product(seeds, POLICIES.items()):
            settings = demo_settings(
                "emulated", conversations=conversations, preset=preset, seed=seed, plain=True, time_scale=time_scale
            )
            found = _measure(variant, settings, source)
            results[policy].append(found)
            console.print(f"seed {seed}, {policy}: TTFET p95 {found['ttfet_ms']['p95']} ms", style="dim")
    console.print(_table(results))
    markdown_path.write_text(as_markdown(results, conversations=conversations), encoding="utf-8")
    json_path.write_text(json.dumps({"conversations": conversations, "policies": results}, indent=2) + "\n", "utf-8")
    console.print(f"written to {json_path} and {markdown_path}")
    return 1 if any(found["errors"] for runs in results.values() for found in runs) else 0


def _measure(variant: Variant, settings: DemoSettings, source: EmulatedSource) -> Figures:
    workload = settings.workload
    tasks = make_tasks(
        workload.conversations,
        seed=settings.seed,
        prompt_chars=workload.prompt_chars,
        arrivals_s=workload.arrivals_s,
        turns=workload.turns,
    )
    trial = Trial(variant=variant, settings=settings, tasks=tasks)
    with source.fresh(variant) as fleet:
        return figures(asyncio.run(run_trial(trial, fleet, console=Console(quiet=True))))


def as_markdown(results: Mapping[str, Sequence[Figures]], *, conversations: int) -> str:
    """Return the table as Markdown, with what it was measured on."""
    seeds = len(next(iter(results.values())))
    about = (
        f"{conversations} conversations a run, {seeds} seeds, emulated engines (2 prefill + 3 decode; affinity: 5 do "
        f"both), {os.cpu_count()} CPUs. Median [lowest .. highest] over the seeds."
    )
    lines = [
        about,
        "",
        "| | " + " | ".join(results) + " |",
        "|---|" + "---:|" * len(results),
    ]
    for label, read in ROWS.items():
        cells = (spread([read(found) for found in runs]) for runs in results.values())
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Values) -> str:
    """Return `median [lowest .. highest]` of the values that exist, or a dash."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, middle, high = min(known), statistics.median(known), max(known)
    return _number(middle) if low == high else f"{_number(middle)} [{_number(low)} .. {_number(high)}]"


def _table(results: Mapping[str, Sequence[Figures]]) -> Table:
    table = Table(title="Median [lowest .. highest] over the seeds", title_justify="left")
    table.add_column("")
    for policy in results:
        table.add_column(policy, justify="right")
    for label, read in ROWS.items():
        table.add_row(label, *(spread([read(found) for found in runs]) for runs in results.values()))
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def _percent(share: float | None) -> float | None:
    return None if share is None else round(share * 100, 2)

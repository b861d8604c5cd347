"""`conserve bench replay`: a trace against engines that really compute, one policy after the other."""

from __future__ import annotations

import asyncio
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from conserve_lab.demo.errors import DemoError
from conserve_lab.live.doors import conserve_door
from conserve_lab.live.energy import EnergyMeter, EnergyUnknown, energy_meter
from conserve_lab.live.fleet import LiveFleet
from conserve_lab.live.merge import merged, spreads
from conserve_lab.live.policy import Policy
from conserve_lab.live.trial import Script, run_trial
from conserve_lab.replay import Chosen, Pace, PromptWriter, tokens_per_word
from conserve_lab.workloads import poisson_arrivals

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRun:
    """What to replay, and how.

    Attributes:
        preset: of the broker under `conserve`.
        broker_url: a broker that runs already; "": one is started for each policy.
        fresh: gives cold engines before every replay but the first; engines that are not ours stay as they are.
        dcgm_urls: pages of DCGM exporters, for engines whose GPUs are elsewhere.
    """

    policies: tuple[Policy, ...]
    chosen: Chosen
    per_s: float
    repetitions: int = 1
    preset: str = "default"
    broker_url: str = ""
    seed: int = 1
    gap_scale: float = 1.0
    dcgm_urls: tuple[str, ...] = ()
    fresh: Callable[[], object] = lambda: None


def run_replay(run: ReplayRun, fleet: LiveFleet, *, json_path: Path | None, console: Console) -> int:
    """Replay, print the table, write the figures: a list with one object a policy.

    Returns:
        0, or 1 when a conversation was given up.

    Raises:
        DemoError: a broker did not start.
        OSError: the file cannot be written.
    """
    meter, unknown = _meter(run)
    if unknown:
        console.print(f"energy not measured: {unknown}", style="yellow", markup=False)
    seen: dict[Policy, list[Figures]] = {policy: [] for policy in run.policies}
    turns = sum(len(given.turns) for given in run.chosen.conversations)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("turns", total=turns * len(run.policies) * run.repetitions)
        for number in range(run.repetitions):
            for policy in run.policies if number % 2 == 0 else run.policies[::-1]:
                if any(seen.values()):
                    run.fresh()
                bar.update(task, description=str(policy))
                one = _replay_once(
                    run,
                    fleet,
                    policy,
                    salt=f"{run.seed}-{policy}-{number}",
                    meter=meter,
                    on_turn=lambda: bar.advance(task),
                )
                seen[policy].append(asyncio.run(one))
    found = [_policy_figures(run, fleet, policy, seen[policy], unknown=unknown) for policy in run.policies]
    console.print(_table(found))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {json_path}")
    return int(any(each["given_up_conversations"] for each in found))


async def _replay_once(
    run: ReplayRun,
    fleet: LiveFleet,
    policy: Policy,
    *,
    salt: str,
    meter: EnergyMeter | None,
    on_turn: Callable[[], object],
) -> Figures:
    engines = fleet.all_both() if policy is Policy.AFFINITY else fleet
    ratio = await tokens_per_word(next(iter(fleet.urls.values())), model=fleet.model)
    writer = PromptWriter(tokens_per_word=ratio, salt=salt)
    arrivals = tuple(poisson_arrivals(len(run.chosen.conversations), per_s=run.per_s, seed=run.seed))
    pace = Pace(arrivals_us=arrivals, gap_scale=run.gap_scale)
    async with conserve_door(engines, policy, preset=run.preset, broker_url=run.broker_url) as opened:
        before_j = meter.joules() if meter else 0.0
        script = Script(trace=run.chosen.conversations, pace=pace, writer=writer)
        found = await run_trial(opened, engines, script, on_turn=on_turn)
        if meter:
            used_j = meter.joules() - before_j
            found["joules"] = round(used_j, 1)
            found["joules_per_output_token"] = round(used_j / max(found["output_tokens"], 1), 4)
    return found


def _meter(run: ReplayRun) -> tuple[EnergyMeter | None, str]:
    try:
        return energy_meter(run.dcgm_urls), ""
    except EnergyUnknown as reason:
        if run.dcgm_urls:
            raise DemoError(str(reason)) from reason
        return None, str(reason)


def _policy_figures(
    run: ReplayRun, fleet: LiveFleet, policy: Policy, repetitions: list[Figures], *, unknown: str
) -> Figures:
    given = run.chosen.conversations
    engines = fleet.all_both() if policy is Policy.AFFINITY else fleet
    found: Figures = {"policy": str(policy), "engines": engines.description, **merged(repetitions)}
    if unknown:
        found["energy"] = f"not measured: {unknown}"
    return found | {
        "spread": spreads(repetitions),
        "repetitions": run.repetitions,
        "workload": {
            "trace": run.chosen.trace,
            "conversations": len(given),
            "turns": sum(len(each.turns) for each in given),
            "cut": run.chosen.cut,
            "passed_over": run.chosen.passed_over,
            "conversations_per_s": run.per_s,
            "preset": run.preset if policy is Policy.CONSERVE and not run.broker_url else "",
            "seed": run.seed,
        },
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
    }


_ROWS: tuple[tuple[str, str], ...] = (
    ("turns", "turns"),
    ("turns that failed", "failed_turns"),
    ("prefill requests", "prefill_requests"),
    ("KV transfers", "transfers"),
    ("tokens moved", "transferred_tokens"),
    ("prompt tokens computed", "computed_prompt_tokens"),
    ("TTFT p50, ms", "ttft_ms.p50"),
    ("TTFT p95, ms", "ttft_ms.p95"),
    ("follow-up TTFT p50, ms", "follow_up_ttft_ms.p50"),
    ("TTFET p50, ms", "ttfet_ms.p50"),
    ("TTFET p95, ms", "ttfet_ms.p95"),
    ("TBT p50, ms", "tbt_ms.p50"),
    ("TBT p95, ms", "tbt_ms.p95"),
    ("TBT p99, ms", "tbt_ms.p99"),
    ("joules per output token", "joules_per_output_token"),
    ("load average", "load_average"),
)


def _table(found: list[Figures]) -> Table:
    title = "medians [lowest .. highest repetition]" if found[0]["repetitions"] > 1 else "one replay each"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for each in found:
        table.add_column(f"{each['policy']} ({each['engines']})", justify="right")
    for label, path in _ROWS:
        cells = [_cell(each, path) for each in found]
        if any(cell != "-" for cell in cells):
            table.add_row(label, *cells)
    return table


def _cell(found: Figures, path: str) -> str:
    value: Any = found
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        return "-"
    spread = found["spread"].get(path)
    if spread is None or spread["min"] == spread["max"]:
        return f"{value:,}"
    return f"{value:,} [{spread['min']:,} .. {spread['max']:,}]"

"""`conserve simulate compare` and `conserve simulate policies`: the commands around the simulator."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from conserve_lab.hardware import engine_kind
from conserve_lab.simulator.compare import Arm, Cell, at_saturation, compare, name_of
from conserve_lab.simulator.policies import POLICIES, SWEPT_CHUNKS, Policy
from conserve_lab.simulator.progress import progress
from conserve_lab.workloads import WorkloadError

COLUMNS: Mapping[str, str] = {
    "TTFET p95 / isolated": "ttfet_p95_norm",
    "TBT p99 ms": "tbt_p99_ms",
    "TBT p99.9 ms": "tbt_p999_ms",
    "J / output token": "joules_per_output_token",
    "wait p95 ms": "queue_wait_p95_ms",
    "re-prefilled": "reprefilled_tokens",
    "moved": "moved_tokens",
}


def run_compare(
    cells: Sequence[Cell],
    policies: Sequence[Policy],
    *,
    seeds: range,
    json_path: Path | None,
    html_path: Path | None,
    processes: int | None,
    console: Console,
) -> int:
    """Run everything, print a table per workload and load, write the rows and the report.

    Raises:
        RunFailed: a run found itself wrong.
        WorkloadError: a workload cannot be used.
        OSError: the file cannot be written.
    """
    arms = [Arm(cell=cell, policy=policy, seed=seed) for cell in cells for policy in policies for seed in seeds]
    with progress(console, len(arms)) as advance:
        rows = compare(arms, processes=processes or os.cpu_count() or 1, advance=advance)
    for cell in cells:
        console.print(_table(cell, rows))
    for engine in sorted({cell.engine for cell in cells}):
        kind = engine_kind(engine)
        console.print(f"{engine}: {kind.source}", style=None if kind.calibrated else "yellow")
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
        console.print(f"written to {json_path}")
    if html_path is not None:
        from conserve_lab.simulator.report import compare_report

        html_path.write_text(compare_report(rows), "utf-8")
        console.print(f"report in {html_path}")
    return 0


def chosen_policies(names: Sequence[str]) -> list[Policy]:
    """Look up policies; `a0@512` is `a0` with 512 tokens a chunk, `paper@8192/512` has 8192 on its prefillers.

    Raises:
        WorkloadError: there is none of that name.
    """
    found = []
    for name in names:
        plain, _, chunks = name.partition("@")
        sizes = [int(chunk) for chunk in chunks.split("/") if chunk.isdigit()] if chunks else []
        if plain not in POLICIES or 0 in sizes or chunks != "/".join(map(str, sizes)) or len(sizes) > 2:
            known = ", ".join(POLICIES)
            raise WorkloadError(
                f"no policy {name!r}: choose from {known}, each also as NAME@CHUNK or NAME@PREFILL/DECODE"
            )
        policy = POLICIES[plain]
        if len(sizes) == 2 and not policy.prefill_share:
            raise WorkloadError(f"{plain} has no prefillers: write {plain}@{sizes[1]}")
        found.append(
            policy.with_chunks(decode=sizes[-1], prefill=sizes[0] if len(sizes) == 2 else None) if sizes else policy
        )
    return found


def cells_of(cells: Sequence[Cell], *, loads: Sequence[float], times: Sequence[float]) -> list[Cell]:
    """Each cell at the loads given in conversations a second, then at those given in times its saturation."""
    found = []
    for cell in cells:
        found += [replace(cell, per_s=per_s) for per_s in loads]
        found += at_saturation(cell, times) if times else []
    return found


def swept(policies: Sequence[Policy]) -> list[Policy]:
    """Each policy at every chunk size of the engines that decode, its own size included."""
    return [
        policy if chunk == policy.decode_chunk else policy.with_chunks(decode=chunk)
        for policy in policies
        for chunk in sorted({*SWEPT_CHUNKS, policy.decode_chunk})
    ]


def _table(cell: Cell, rows: Sequence[Mapping[str, Any]]) -> Table:
    name = name_of(cell)
    title = f"{name}, {cell.per_s:g} conversations/s on {cell.engines} x {cell.engine}"
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    for label in COLUMNS:
        table.add_column(label, justify="right")
    for row in rows:
        if (row["workload"], row["load"]) == (name, cell.per_s):
            table.add_row(row["policy"], *(_shown(row[key]) for key in COLUMNS.values()))
    return table


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:,.2f}"

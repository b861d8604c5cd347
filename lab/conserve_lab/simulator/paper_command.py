"""`conserve simulate paper`: the table under both accountings, the headlines, a figure, and what to make of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from conserve_lab.simulator.paper import SATURATION, paper_runs, run_paper
from conserve_lab.simulator.progress import progress
from conserve_lab.simulator.published import HEADLINE

ACCOUNTINGS: Mapping[str, str] = {
    "artifact": "as the published code counts: from admission, the prefillers' queues left out",
    "arrival": "from the conversation's arrival",
}
HEADLINES: Mapping[str, str] = {
    "ttfet_p95_reduction_pct": "p95 TTFET, less than AMPD-like, %",
    "tokens_per_joule_gain_pct": "tokens per joule, more than AMPD-like, %",
    "heterogeneous_gain_pct": "tokens per joule, decoders at 200 W instead of 300 W, %",
}
CLOSE_PCT = 5.0
"""A headline that comes out within this many points of the published one is called reproduced."""


def run_paper_command(
    workload: str,
    *,
    seeds: range,
    processes: int | None,
    figure: Path | None,
    json_path: Path | None,
    console: Console,
) -> int:
    """Run the experiment, print it, draw it.

    Raises:
        WorkloadError: the trace cannot be used.
        OSError: a file cannot be written.
    """
    runs = paper_runs(workload=workload, seeds=seeds)
    with progress(console, len(runs)) as advance:
        found = run_paper(runs, processes=processes or os.cpu_count() or 1, advance=advance)
    for accounting, about in ACCOUNTINGS.items():
        console.print(_table(f"{accounting}: {about}", found[accounting]["rows"]))
    console.print(_headlines(found))
    for line in verdicts(found):
        console.print(line)
    if figure is not None:
        from conserve_lab.simulator.figures import draw_paper

        draw_paper(found, figure)
        console.print(f"drawn to {figure}")
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        console.print(f"written to {json_path}")
    return 0


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """Say of each headline whether it comes out, under which accounting."""
    lines = []
    for name, label in HEADLINES.items():
        told = HEADLINE[name]
        close = [
            accounting for accounting in ACCOUNTINGS if abs(found[accounting]["headline"][name] - told) <= CLOSE_PCT
        ]
        figures = ", ".join(f"{found[accounting]['headline'][name]:+.1f} ({accounting})" for accounting in ACCOUNTINGS)
        said = f"reproduces ({', '.join(close)})" if close else "does not reproduce under either accounting"
        lines.append(f"{label}: published {told:+.2f}, here {figures}: {said}")
    return lines


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for label in ("system", "conv/s", "W"):
        table.add_column(label)
    for label in ("TTFET p95", "TBT p95", "E2E p95", "tokens/J", "TBT p99 ms"):
        table.add_column(label, justify="right")
    for row in rows:
        cells = [_beside(row, name) for name in ("ttfet_p95_norm", "tbt_p95_norm", "e2e_p95_norm", "tokens_per_joule")]
        table.add_row(row["system"], f"{row['load']:g}", str(row["decoder_w"]), *cells, f"{row['tbt_p99_ms']:.0f}")
    return table


def _beside(row: Mapping[str, Any], name: str) -> str:
    """The value, and in brackets what was published and how far we are from it."""
    told = row[f"{name}_published"]
    return f"{row[name]:.2f}" if told is None else f"{row[name]:.2f} ({told:g}, {row[f'{name}_error_pct']:+.0f} %)"


def _headlines(found: Mapping[str, Any]) -> Table:
    table = Table(title=f"Headlines at {SATURATION} conversations/s", title_justify="left")
    table.add_column("")
    for label in ("published", *ACCOUNTINGS):
        table.add_column(label, justify="right")
    for name, label in HEADLINES.items():
        cells = [f"{found[accounting]['headline'][name]:.1f}" for accounting in ACCOUNTINGS]
        table.add_row(label, f"{HEADLINE[name]:.2f}", *cells)
    return table

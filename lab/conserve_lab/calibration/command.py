"""`conserve lab calibrate`: the fit, and how far it is off, cell by cell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conserve_lab.calibration.cells import load_cells
from conserve_lab.calibration.fit import cell_errors, fit

WORST_MAX, MEAN_MAX = 0.15, 0.05
"""What a fit may be off by: any one cell, and all of them on average."""

Rows = Sequence[tuple[str, int, int, float]]


def run_calibrate(path: Path, *, prefill_column: str, json_path: Path | None, console: Console) -> int:
    """Fit, print, and judge.

    Returns:
        0, or 1 when the model is off by more than `WORST_MAX` somewhere or `MEAN_MAX` on average.

    Raises:
        CalibrationError: the cells cannot be used.
        OSError: a file cannot be read or written.
    """
    cells = load_cells(path, prefill_column=prefill_column)
    engine = fit(cells)
    rows = cell_errors(engine, cells)
    console.print(_table(cells.engine, rows))
    console.print(f"cells: {cells.source}", style="dim")
    console.print(", ".join(f"{name} {value}" for name, value in asdict(engine.cost).items()))
    console.print(f"front_us {engine.front_us}")
    worst, mean = _worst(rows), _mean(rows)
    console.print(f"{len(rows)} cells: {mean:.1%} off on average, {worst:.1%} at worst")
    if json_path is not None:
        data = {
            "engine": cells.engine,
            "source": cells.source,
            "cost": asdict(engine.cost),
            "front_us": engine.front_us,
            "mean_error": round(mean, 5),
            "worst_error": round(worst, 5),
            "cells": [
                {"cell": name, "measured_us": measured, "predicted_us": predicted, "error": round(error, 5)}
                for name, measured, predicted, error in rows
            ],
        }
        json_path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
        console.print(f"written to {json_path}")
    return int(worst > WORST_MAX or mean > MEAN_MAX)


def _table(engine: str, rows: Rows) -> Table:
    table = Table(title=engine, title_justify="left")
    table.add_column("cell")
    for label in ("measured ms", "model ms", "error"):
        table.add_column(label, justify="right")
    for name, measured, predicted, error in rows:
        style = "red" if abs(error) > WORST_MAX else None
        table.add_row(name, f"{measured / 1000:,.1f}", f"{predicted / 1000:,.1f}", f"{error:+.1%}", style=style)
    return table


def _worst(rows: Rows) -> float:
    return max(abs(error) for *_, error in rows)


def _mean(rows: Rows) -> float:
    return sum(abs(error) for *_, error in rows) / len(rows)

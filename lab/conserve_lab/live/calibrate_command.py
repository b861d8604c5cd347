"""`conserve lab calibrate --engine`: fit to half of what is measured, judge by the other half and by conversations."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from conserve_lab.calibration import Cells, DecodeCell, FittedEngine, cell_errors, fit, save_cells
from conserve_lab.calibration.command import MEAN_MAX, WORST_MAX
from conserve_lab.demo.errors import DemoError
from conserve_lab.live.cells import CellMeter, FrontCell, Grid, known_tokens
from conserve_lab.live.fleet import LiveFleet
from conserve_lab.live.prediction import Predicted, fit_front, predicted_turns, replay_on, summary
from conserve_lab.live.thin_client import StreamFailed
from conserve_lab.replay import Chosen, ConversationSample
from conserve_lab.vllm.counters import EngineCounters, parse_counters

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCalibration:
    """What to do at an engine.

    Attributes:
        chosen: conversations to predict.
        per_s: how many of them begin in a second.
        max_num_batched_tokens: the engine's chunk of prefill, which it does not tell over HTTP.
        max_num_seqs: the engine's, which it does not tell either.
    """

    grid: Grid
    chosen: Chosen
    per_s: float = 0.5
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 32
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    cells: Cells
    fronts: list[FrontCell]
    conversations: list[ConversationSample]
    counters: EngineCounters
    load_average: tuple[float, float]


def run_live_calibration(
    run: LiveCalibration, fleet: LiveFleet, *, cells_path: Path | None, json_path: Path | None, console: Console
) -> int:
    """Measure, fit, print, and judge.

    Args:
        run: what to measure.
        fleet: the engine; the first of several.
        cells_path: write the measured cells here, as `--cells` reads them.
        json_path: write the figures here.
        console: where the tables go.

    Returns:
        0, or 1 when the held-out cells are off by more than `WORST_MAX` somewhere or `MEAN_MAX` on average.

    Raises:
        CalibrationError: there are too few cells.
        DemoError: the engine failed.
        OSError: a file cannot be written.
    """
    url = next(iter(fleet.urls.values()))
    try:
        measured = _with_bar(run, url, fleet.model, console)
    except (StreamFailed, httpx2.HTTPError, OSError) as error:
        raise DemoError(f"the engine at {url} failed: {type(error).__name__}: {error}") from error
    if cells_path is not None:
        save_cells(cells_path, measured.cells)
    fitting, held_out = halves(measured.cells)
    fitted = fit(fitting)
    front = fit_front(measured.fronts, fitted)
    predicted = predicted_turns(
        fitted,
        front,
        measured.conversations,
        run.chosen.conversations,
        counters=measured.counters,
        max_num_batched_tokens=run.max_num_batched_tokens,
        max_num_seqs=run.max_num_seqs,
    )
    found = _figures(run, fleet, measured, fitted, parts=(fitting, held_out), predicted=predicted)
    found["front"] = asdict(front) | {"cells": [asdict(cell) for cell in measured.fronts]}
    _print(found, console)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {json_path}")
    judged = found["held_out"]
    return int(judged["worst_error"] > WORST_MAX or judged["mean_error"] > MEAN_MAX)


def halves(cells: Cells) -> tuple[Cells, Cells]:
    """Part cells into those to fit and those to judge by: every other one in order of size."""
    # Like the squares of a chess board, so that both halves see every number of sequences and every context.
    rows = sorted({cell.sequences for cell in cells.decode})
    columns = {row: sorted(cell.context_tokens for cell in cells.decode if cell.sequences == row) for row in rows}
    decode: tuple[list[DecodeCell], list[DecodeCell]] = ([], [])
    for cell in cells.decode:
        square = rows.index(cell.sequences) + columns[cell.sequences].index(cell.context_tokens)
        decode[square % 2].append(cell)
    prefill = sorted(cells.prefill, key=lambda cell: cell.prompt_tokens)
    first, second = (replace(cells, decode=tuple(decode[half]), prefill=tuple(prefill[half::2])) for half in range(2))
    return first, second


def _with_bar(run: LiveCalibration, url: str, model: str, console: Console) -> _Measured:
    turns = sum(len(given.turns) for given in run.chosen.conversations)
    columns = (TextColumn("measured"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measured", total=run.grid.measurements + turns)
        return asyncio.run(_measure(run, url, model, advance=lambda: bar.advance(task)))


async def _measure(run: LiveCalibration, url: str, model: str, *, advance: Callable[[], object]) -> _Measured:
    before = os.getloadavg()[0]
    meter = CellMeter(url, model=model, token_ids=await known_tokens(url, model=model))
    cells = await meter.measure(run.grid, max_num_batched_tokens=run.max_num_batched_tokens, on_cell=advance)
    fronts = await meter.fronts(run.grid.front_tokens, repetitions=run.grid.repetitions, on_cell=advance)
    trace = run.chosen.conversations
    conversations = await replay_on(url, model=model, trace=trace, per_s=run.per_s, seed=run.seed, on_turn=advance)
    async with httpx2.AsyncClient(timeout=30.0, trust_env=False) as http:
        page = (await http.get(f"{url}/metrics")).raise_for_status().text
    return _Measured(
        cells=cells,
        fronts=fronts,
        conversations=conversations,
        counters=parse_counters(page),
        load_average=(round(before, 2), round(os.getloadavg()[0], 2)),
    )


def _figures(
    run: LiveCalibration,
    fleet: LiveFleet,
    measured: _Measured,
    fitted: FittedEngine,
    *,
    parts: tuple[Cells, Cells],
    predicted: Sequence[Predicted],
) -> Figures:
    return {
        "engine": f"{fleet.model}, {fleet.description}",
        "cost": asdict(fitted.cost),
        "front_us": fitted.front_us,
        "fitted": _errors_of(fitted, parts[0]),
        "held_out": _errors_of(fitted, parts[1]),
        "prediction": summary(predicted)
        | {
            "trace": run.chosen.trace,
            "conversations": len(run.chosen.conversations),
            "each_turn": [{**asdict(each), "error": round(each.error, 4)} for each in predicted],
        },
        "max_num_batched_tokens": run.max_num_batched_tokens,
        "repetitions": run.grid.repetitions,
        "cpus": os.cpu_count(),
        "load_average": measured.load_average,
    }


def _errors_of(fitted: FittedEngine, cells: Cells) -> Figures:
    rows = cell_errors(fitted, cells)
    sizes = [abs(error) for *_, error in rows]
    kinds = {kind: [abs(row[3]) for row in rows if row[0].startswith(kind)] for kind in ("decode", "prefill")}
    return {
        "cells": len(rows),
        "mean_error": round(sum(sizes) / len(sizes), 5),
        "worst_error": round(max(sizes), 5),
        **{f"{kind}_mean_error": round(sum(each) / len(each), 5) for kind, each in kinds.items()},
        "each_cell": [
            {"cell": name, "measured_us": seen, "predicted_us": said, "error": round(error, 5)}
            for name, seen, said, error in rows
        ],
    }


def _print(found: Figures, console: Console) -> None:
    table = Table(title=f"{found['engine']}: cells that were not fitted", title_justify="left")
    table.add_column("cell")
    for label in ("measured ms", "model ms", "error"):
        table.add_column(label, justify="right")
    for row in found["held_out"]["each_cell"]:
        style = "red" if abs(row["error"]) > WORST_MAX else None
        times = [f"{row[key] / 1000:,.1f}" for key in ("measured_us", "predicted_us")]
        table.add_row(row["cell"], *times, f"{row['error']:+.1%}", style=style)
    console.print(table)
    for name in ("fitted", "held_out"):
        part = found[name]
        console.print(
            f"{name.replace('_', ' ')}: {part['cells']} cells, {part['mean_error']:.1%} off on average, "
            f"{part['worst_error']:.1%} at worst (decode {part['decode_mean_error']:.1%}, prefill "
            f"{part['prefill_mean_error']:.1%})"
        )
    for name in ("all", "first_turns", "follow_ups"):
        if part := found["prediction"].get(name):
            console.print(
                f"TTFT of {part['turns']} replayed turns ({name.replace('_', ' ')}): off by {part['abs_p50']:.1%} at "
                f"the median, {part['abs_p90']:.1%} at p90; measured p50 {part['measured_ms']['p50']} ms, foreseen "
                f"{part['foreseen_ms']['p50']} ms"
            )
    console.print(f"load average {found['load_average'][0]} before, {found['load_average'][1]} after", style="dim")

"""Figures like the paper's: load against TTFET, time between tokens and tokens per joule, and what was published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from conserve_lab.simulator.paper import SYSTEMS

_PANELS = (
    ("ttfet_p95_norm", "TTFET p95 / isolated", "log"),
    ("tbt_p95_norm", "last-turn TBT p95 / isolated", "linear"),
    ("tokens_per_joule", "tokens per joule", "linear"),
)
_COLORS = ("#4477aa", "#aa3377", "#ccbb44", "#228833", "#66ccee", "#bbbbbb")
"""Distinguishable for colour-blind readers (Paul Tol's bright scheme)."""


def draw_paper(found: Mapping[str, Any], path: Path) -> None:
    """Draw a row of panels per accounting; hollow marks are published values.

    Raises:
        OSError: the file cannot be written.
        ValueError: the file's ending names no format.
    """
    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(len(found), len(_PANELS), squeeze=False)
    for line, (accounting, data) in enumerate(found.items()):
        for column, (name, label, scale) in enumerate(_PANELS):
            panel = axes[line][column]
            for color, system in zip(_COLORS, SYSTEMS, strict=True):
                _curve(panel, data["rows"], system, name, color)
            panel.set_yscale(scale)
            panel.set_xlabel("conversations/s")
            panel.set_ylabel(label)
            panel.set_title(f"counted: {accounting}", fontsize=9)
            panel.grid(visible=True, alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SYSTEMS))
    figure.savefig(path, dpi=110)


def _curve(panel: Any, rows: list[Mapping[str, Any]], system: str, name: str, color: str) -> None:
    mine = [row for row in rows if row["system"] == system and row["decoder_w"] == 300]
    panel.plot([row["load"] for row in mine], [row[name] for row in mine], marker=".", color=color, label=system)
    told = [row for row in mine if row[f"{name}_published"] is not None]
    panel.plot(
        [row["load"] for row in told],
        [row[f"{name}_published"] for row in told],
        linestyle="none",
        marker="o",
        markerfacecolor="none",
        color=color,
    )

"""The table of `conserve bench peers`, on a screen and for a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

Figures = dict[str, Any]

_ROWS: tuple[tuple[str, str], ...] = (
    ("prefill requests", "prefill_requests"),
    ("tokens moved", "transferred_tokens"),
    ("prompt tokens computed", "computed_prompt_tokens"),
    ("TTFT p50, ms", "ttft_ms.p50"),
    ("TTFT p95, ms", "ttft_ms.p95"),
    ("TTFT p99, ms", "ttft_ms.p99"),
    ("TTFET p50, ms", "ttfet_ms.p50"),
    ("TTFET p95, ms", "ttfet_ms.p95"),
    ("TTFET p99, ms", "ttfet_ms.p99"),
    ("TBT p50, ms", "tbt_ms.p50"),
    ("TBT p95, ms", "tbt_ms.p95"),
    ("TBT p99, ms", "tbt_ms.p99"),
    ("router or broker CPU, us per turn", "cpu_us_per_turn.router|cpu_us_per_turn.broker"),
    ("the same while idle, ms per s", "idle_cpu_ms_per_s.router|idle_cpu_ms_per_s.broker"),
    ("driver CPU (SDK included), us per turn", "cpu_us_per_turn.driver"),
    ("SDK's share of it", "cpu_us_per_turn.sdk_share"),
    ("kill: turns that failed", "kill.failed_turns"),
    ("kill: attempts that failed", "kill.failed_attempts"),
    ("kill: s to recovery", "kill.recovery_s"),
    ("kill: slowest TTFT after it, ms", "kill.slowest_ttft_ms"),
    ("kill: conversations given up", "kill.given_up_conversations"),
)


def printed_table(arms: Sequence[Figures]) -> Table:
    """Return the table for a screen: medians, and the lowest and highest repetition."""
    table = Table(title="medians [lowest .. highest repetition]", title_justify="left")
    table.add_column("")
    for arm in arms:
        table.add_column(arm["arm"], justify="right")
    for label, cells in _table_rows(arms):
        table.add_row(label, *cells)
    return table


def markdown_table(arms: Sequence[Figures]) -> str:
    """Return the table in Markdown."""
    lines = [f"| | {' | '.join(arm['arm'] for arm in arms)} |", f"|---|{'---:|' * len(arms)}"]
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in _table_rows(arms)]
    lines += [f"\n{arm['arm']} skipped: {arm['skipped']}" for arm in arms if "skipped" in arm]
    return "\n".join(lines) + "\n"


def _table_rows(arms: Sequence[Figures]) -> list[tuple[str, list[str]]]:
    rows = [(label, [_cell(arm, paths) for arm in arms]) for label, paths in _ROWS]
    return [(label, cells) for label, cells in rows if any(cell != "-" for cell in cells)]


def _cell(arm: Figures, paths: str) -> str:
    if "skipped" in arm:
        return "skipped"
    for path in paths.split("|"):
        value: Any = arm
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            continue
        spread = arm["spread"].get(path)
        if spread is None or spread["min"] == spread["max"]:
            return _number(value)
        return f"{_number(value)} [{_number(spread['min'])} .. {_number(spread['max'])}]"
    return "-"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"

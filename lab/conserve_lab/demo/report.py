"""The closing table and the JSON file of the demo."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Figures = Mapping[str, Any]

COLUMNS = {"conserve": "ConServe", "per_turn": "per turn", "affinity": "affinity"}
"""Headings by variant; the first one is the demo's own run."""


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _tenths(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _ms(value: Mapping[str, float | None]) -> str:
    return " / ".join(_whole(found) for found in value.values())


_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("conversations", "conversations", _whole),
    ("turns", "turns", _whole),
    ("tool calls", "tool_calls", _whole),
    ("leases", "leases", _whole),
    ("leases that migrated", "leases_migrated", _whole),
    ("KV transfers (engines' counters)", "migrations", _whole),
    ("migrations per migrated lease", "migrations_per_migrated_lease", _ratio),
    ("tokens of KV moved", "moved_tokens", _whole),
    ("moves to another decoder, by a new lease", "re_leases", _whole),
    ("follow-up turns", "follow_up_turns", _whole),
    ("follow-up turns that touched a prefiller", "follow_up_turns_on_prefiller", _whole),
    ("follow-up prompt tokens served from cache", "follow_up_cached_token_share", _percent),
    ("TTFT ms, p50 / p95", "ttft_ms", _ms),
    ("TTFET ms, p50 / p95", "ttfet_ms", _ms),
    ("time between tokens ms, p50 / p95 / p99", "tbt_ms", _ms),
    ("machine lag ms (0 is idle), p95", "machine_lag_ms", _tenths),
    ("errors", "errors", _whole),
)


def closing_table(by_variant: Mapping[str, Figures], *, engine_counts: Mapping[str, str]) -> Table:
    """Put the runs beside each other.

    Args:
        by_variant: figures by variant, the demo's own first.
        engine_counts: what each variant ran on, such as `2 prefillers + 3 decoders`.
    """
    table = Table(title="The same workload, three ways", title_justify="left")
    table.add_column("")
    for variant in by_variant:
        table.add_column(COLUMNS[variant], justify="right")
    table.add_row("engines", *(engine_counts[variant] for variant in by_variant))
    for label, key, show in _ROWS:
        table.add_row(label, *(show(figures[key]) for figures in by_variant.values()))
    return table


def print_report(
    console: Console, by_variant: Mapping[str, Figures], *, engine_counts: Mapping[str, str], problems_max: int = 10
) -> None:
    """Print the closing table and, below it, what went wrong."""
    console.print(closing_table(by_variant, engine_counts=engine_counts))
    for variant, figures in by_variant.items():
        for problem in figures["error_details"][:problems_max]:
            console.print(f"error ({COLUMNS[variant]}): {problem}", style="red", markup=False, highlight=False)


def as_json(by_variant: Mapping[str, Figures], **about: Any) -> dict[str, Any]:
    """Return the document of `--json`: the demo's own figures at the top, each other run under its name."""
    own = next(iter(by_variant))
    others = {name: dict(figures) for name, figures in by_variant.items() if name != own}
    return {**by_variant[own], **about, **others}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write the document, readable by people too.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

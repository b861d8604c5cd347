"""The comparison as one HTML file: losses first, then fronts and every row. Nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from conserve_lab.hardware import engine_kind
from conserve_lab.simulator.fronts import COLORS, front, legend
from conserve_lab.simulator.verdicts import Verdict, cells, family, goals, rows_of, verdicts

_STYLE = """
:root { color-scheme: light; font: 15px/1.5 system-ui, sans-serif; color: #1c2430; }
body { max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; background: #fff; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; font-size: 1.25rem; }
h3 { margin: 1.6rem 0 .3rem; font-size: 1rem; } p.note, .legend { color: #56616f; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .22rem .55rem; text-align: right; border-bottom: 1px solid #e4e8ee; white-space: nowrap; }
th { font-weight: 600; color: #56616f; } th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; }
td.worse { background: #fde8ea; } td.better { background: #e6f3e9; } tr.ours td { font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: .6rem; }
.plots figure { margin: 0; } figcaption { color: #56616f; font-size: .85rem; }
svg { width: 100%; height: auto; background: #fbfcfd; } svg text { font: 11px system-ui, sans-serif; fill: #56616f; }
svg .grid { stroke: #e4e8ee; } .key { margin-right: 1.1rem; } .key i { display: inline-block; width: .75rem;
height: .75rem; border-radius: 50%; margin-right: .35rem; } details { margin: .4rem 0 0; } .warn { color: #a15c00; }
"""

_COLUMNS: Mapping[str, str] = {
    "TTFET p95 / alone": "ttfet_p95_norm",
    "TBT p99 ms": "tbt_p99_ms",
    "TBT p99.9 ms": "tbt_p999_ms",
    "J / output token": "joules_per_output_token",
    "wait p95 s": "queue_wait_p95_ms",
    "re-prefilled": "reprefilled_tokens",
    "moved": "moved_tokens",
}
_PANELS = (
    ("tbt_p99_ms", "last-turn TBT p99, ms"),
    ("tbt_p999_ms", "last-turn TBT p99.9, ms"),
    ("joules_per_output_token", "joules per output token"),
)
_RATIOS = (
    ("ttfet_p95_norm", "TTFET p95"),
    ("tbt_p99_ms", "TBT p99"),
    ("tbt_p999_ms", "TBT p99.9"),
    ("joules_per_output_token", "J / token"),
)
_NOTICEABLE = 0.02


def compare_report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the report of a comparison's rows."""
    found = verdicts(rows)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>ConServe: policies compared</title><style>{_STYLE}</style></head><body>",
        "<h1>Placement policies compared</h1>",
        _about(rows),
    ]
    if found:
        parts += ["<h2>Where ours loses, worst first</h2>", _losses(found), "<h2>Goals</h2>", _goals(found)]
    parts += ["<h2>Fronts</h2>", _reading(), legend()]
    for cell in cells(rows):
        parts.append(_cell(cell, rows_of(rows, cell)))
    return "\n".join([*parts, "</body></html>", ""])


def _about(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for name in sorted({row["settings"]["engine"] for row in rows}):
        kind = engine_kind(name)
        style = "note" if kind.calibrated else "note warn"
        lines.append(f'<p class="{style}">{escape(name)}: {escape(kind.source)}</p>')
    seeds = sorted({row["settings"]["seeds"] for row in rows})
    told = " to ".join(str(count) for count in dict.fromkeys((seeds[0], seeds[-1]))) if seeds else "0"
    return (
        '<p class="note">Simulated: the production placement on modelled engines, in virtual time. Medians over '
        f"{told} seeds. Times count from a conversation's arrival; TTFET is divided by what the conversation would "
        "take on an engine of its own. Every policy with leases has the same admission.</p>" + "".join(lines)
    )


def _losses(found: Sequence[Verdict]) -> str:
    head = "".join(f"<th>{label}</th>" for _, label in _RATIOS)
    body = []
    for verdict in sorted(found, key=lambda verdict: -verdict.ratios["ttfet_p95_norm"]):
        load = f"{verdict.load:g}" + ("" if verdict.saturation is None else f" ({verdict.saturation:g} x full)")
        ratios = "".join(_ratio(verdict.ratios[name]) for name, _ in _RATIOS)
        by = ", ".join(verdict.dominated_by) or "-"
        body.append(
            f"<tr><td>{escape(verdict.workload)}</td><td>{load}</td>{ratios}"
            f'<td>{verdict.ours["queue_wait_p95_ms"] / 1000:.1f}</td><td class="text">{escape(by)}</td></tr>'
        )
    return (
        '<p class="note"><b>default</b> over <b>a2</b>, the strongest reference (affinity, the same admission, host KV '
        "tier, long-prefill threshold): above 1 it loses. The last column names every setting of the references that "
        "is at least as good on all three of TTFET p95, TBT p99 and TBT p99.9.</p>"
        f"<table><tr><th>workload</th><th>conv/s</th>{head}<th>wait p95 s</th><th>dominated by</th></tr>"
        f"{''.join(body)}</table>"
    )


def _ratio(value: float) -> str:
    style = "worse" if value > 1 + _NOTICEABLE else "better" if value < 1 - _NOTICEABLE else ""
    return f'<td class="{style}">{value:.2f}</td>'


def _goals(found: Sequence[Verdict]) -> str:
    lines = [
        f"<tr><td>{escape(sentence)}</td><td>{held} of {of}</td></tr>" for sentence, held, of in goals(found) if of
    ]
    return f"<table><tr><th>the same constants everywhere</th><th>holds at</th></tr>{''.join(lines)}</table>"


def _reading() -> str:
    return (
        '<p class="note">Lower left is better; both axes are logarithmic. Each point is a setting, those of one policy '
        "are joined; large points are a policy's own chunk sizes, small ones the sweep. Grey points tell their names "
        "when the pointer rests on them.</p>"
    )


def _cell(cell: tuple[str, float], rows: Sequence[Mapping[str, Any]]) -> str:
    settings = rows[0]["settings"]
    full = settings.get("saturation")
    title = f"{cell[0]}, {cell[1]:g} conversations/s" + ("" if full is None else f" ({full:g} times full)")
    figures = []
    for name, label in _PANELS:
        svg, out = front(
            rows, x="ttfet_p95_norm", y=name, x_label="TTFET p95 over isolated, from arrival", y_label=label
        )
        beyond = f"<figcaption>{out} further out, in the table</figcaption>" if out else ""
        figures.append(f"<figure>{svg}{beyond}</figure>")
    where = f"{settings['engines']} x {settings['engine']}, {settings['conversations']} conversations"
    return (
        f'<h3>{escape(title)}</h3><p class="note">{escape(where)}</p><div class="plots">{"".join(figures)}</div>'
        f"<details><summary>all {len(rows)} settings</summary>{_table(rows)}</details>"
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{label}</th>" for label in _COLUMNS)
    body = []
    for row in sorted(rows, key=lambda row: (family(row) not in COLORS, row["ttfet_p95_norm"])):
        cells_ = "".join(f"<td>{_shown(name, row[name])}</td>" for name in _COLUMNS.values())
        ours = ' class="ours"' if row["policy"] == "default" else ""
        body.append(f"<tr{ours}><td>{escape(row['policy'])}</td>{cells_}</tr>")
    return f"<table><tr><th>policy</th>{head}</tr>{''.join(body)}</table>"


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name == "queue_wait_p95_ms":
        return f"{value / 1000:.1f}"
    return f"{value:,.0f}" if name.endswith("_tokens") else f"{value:.4g}"

"""Fronts as SVG: what a policy gives of one thing for another, one point per setting. No script, no outside asset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from conserve_lab.simulator.verdicts import family

WIDTH, HEIGHT = 430, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40
FARTHEST = 6.0
"""Points at more than so many times the best on either axis are left to the table."""

COLORS: Mapping[str, str] = {  # Paul Tol's bright scheme: distinguishable for colour-blind readers
    "default": "#4477aa",
    "a2": "#ee6677",
    "a0": "#ccbb44",
    "a0-host": "#aa3377",
    "paper": "#228833",
}
OTHER = "#bbbbbb"


def front(rows: Sequence[Mapping[str, Any]], *, x: str, y: str, x_label: str, y_label: str) -> tuple[str, int]:
    """Draw a front with both axes logarithmic, lower left better.

    Returns:
        The SVG, and how many points lie too far out to be shown.
    """
    points = [row for row in rows if row[x] and row[y]]
    shown = [row for row in points if _near(row, points, x) and _near(row, points, y)]
    across = _Axis([row[x] for row in shown], _LEFT, WIDTH - _RIGHT)
    upward = _Axis([row[y] for row in shown], HEIGHT - _BOTTOM, _TOP)
    lines = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(x_label)} against {escape(y_label)}">',
        *_grid(across, upward, x_label, y_label),
    ]
    names = list(dict.fromkeys(family(row) for row in shown))
    for name in sorted(names, key=lambda name: (name == "default", name in COLORS)):
        mine = sorted((row for row in shown if family(row) == name), key=lambda row: row[x])
        lines += _curve(name, mine, [(across.at(row[x]), upward.at(row[y])) for row in mine], x, y)
    return "\n".join([*lines, "</svg>"]), len(points) - len(shown)


def legend() -> str:
    """Which colour is whose."""
    marks = [
        f'<span class="key"><i style="background:{color}"></i>{name}</span>'
        for name, color in [*COLORS.items(), ("the others", OTHER)]
    ]
    return f'<p class="legend">{"".join(marks)}</p>'


class _Axis:
    """Logarithmic; `at` tells where a value lies."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values, default=1.0), max(values, default=10.0)
        margin = max((high / low) ** 0.08, 1.04)
        self.low, self.high = low / margin, high * margin
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Round values, at least two where there is room for them."""
        for steps in (
            (1, 2, 5),
            (1, 1.5, 2, 3, 5, 7),
            (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
        ):
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [step * 10**decade for decade in decades for step in steps]
            inside = [value for value in found if self.low <= value <= self.high]
            if len(inside) >= 3:
                return inside
        return inside


def _near(row: Mapping[str, Any], points: Sequence[Mapping[str, Any]], name: str) -> bool:
    ours = [point[name] for point in points if family(point) in COLORS]
    best = min(ours or [point[name] for point in points])
    return bool(row[name] <= best * FARTHEST)


def _grid(across: _Axis, upward: _Axis, x_label: str, y_label: str) -> list[str]:
    lines = []
    for value in across.ticks():
        x = across.at(value)
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" class="grid"/>')
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 14}" text-anchor="middle">{value:g}</text>')
    for value in upward.ticks():
        y = upward.at(value)
        lines.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        lines.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    lines.append(f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    lines.append(
        f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{escape(y_label)}</text>'
    )
    return lines


def _curve(
    name: str, rows: Sequence[Mapping[str, Any]], places: Sequence[tuple[float, float]], x: str, y: str
) -> list[str]:
    color = COLORS.get(name, OTHER)
    lines = []
    if len(places) > 1:
        path = " ".join(f"{across:.1f},{up:.1f}" for across, up in places)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-opacity=".55"/>')
    for row, (across, up) in zip(rows, places, strict=True):
        own = row["policy"] == name
        radius = 6.5 if own and name == "default" else 4.5 if own and name in COLORS else 3
        told = escape(f"{row['policy']}: {row[x]:g} | {row[y]:g}")
        place = f'cx="{across:.1f}" cy="{up:.1f}" r="{radius}"'
        lines.append(f'<circle {place} fill="{color}"><title>{told}</title></circle>')
    return lines

"""docs/paper.md quotes figures; each of them stands in docs/simulation.md, where the command that makes it is."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
FIGURE = re.compile(r"\d+(?:\.\d+)?(?=[\d. to]* (?:%|times|of 24))|\b0\.\d+\b|\b1\.634\b")
"""Shares, ratios and counts of cases; years, ADRs and watts are none."""


def figures(page: str) -> set[str]:
    return set(FIGURE.findall((DOCS / page).read_text().replace("**", "")))


def test_every_figure_is_measured_elsewhere() -> None:
    quoted = figures("paper.md")
    assert {"51", "7.5", "22.8", "4.2", "0.64", "18"} <= quoted, "the pattern finds what it should"
    measured = set(re.findall(r"\d+(?:\.\d+)?", (DOCS / "simulation.md").read_text()))
    assert sorted(quoted - measured) == []

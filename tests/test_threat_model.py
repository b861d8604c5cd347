"""The threat model names a test for every row; they exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"`(test_\w+\.py)::(test_\w+)` \|$", re.MULTILINE)
TABLES = {"Threats to the broker": 20, "What the guard closes": 15}
"""Sections of the page, and how many rows they have at least."""


@cache
def functions_in(file: str) -> frozenset[str]:
    (path,) = (ROOT / "tests").rglob(file)  # the page names files without their folders
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize(("heading", "rows_min"), TABLES.items())
def test_every_row_names_a_test_that_exists(heading: str, rows_min: int) -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    table = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    named = ROW.findall(table)
    assert len(named) == len(rows) >= rows_min
    missing = [f"{file}::{name}" for file, name in named if name not in functions_in(file)]
    assert missing == []

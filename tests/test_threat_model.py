"""The threat model names a test for every row; they exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"`(test_\w+\.py)::(test_\w+)` \|$", re.MULTILINE)


def test_every_row_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    table = text.partition("## Threats to the broker")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| threat")]
    named = ROW.findall(table)
    assert len(named) == len(rows) > 20
    tests = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    for file, name in named:
        tree = ast.parse(tests[file].read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in functions, f"{file} has no {name}"

"""Every public name of the SDK and its adapters is used by the programs beside this file, rightly and wrongly.

mypy reads those programs (`make check`); it also fails where a `type: ignore` is needed no more, so that a wrong use
which has come to be accepted is noticed.
"""

import ast
import importlib
from pathlib import Path

import pytest

PROGRAMS = sorted(Path(__file__).parent.glob("*_usage.py"))
PACKAGES = (
    "conserve_sdk",
    "conserve_sdk.testing",
    "conserve_langgraph",
    "conserve_openai_agents",
    "conserve_pydantic_ai",
)
PROTOCOLS = {"TurnHook", "TurnObserver"}
CANNOT_BE_USED_WRONGLY = {"BASE_URL", "HEADER_CONVERSATION", "HEADER_LINEAGE"}


def used(package: str, *, wrongly: bool) -> set[str]:
    """The names of a package that the programs use in functions of one kind."""
    found: set[str] = set()
    for program in PROGRAMS:
        tree = ast.parse(program.read_text())
        froms = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == package]
        given = {alias.asname or alias.name: alias.name for node in froms for alias in node.names}
        functions = [node for node in tree.body if not isinstance(node, ast.ImportFrom)]
        for function in functions:
            name = getattr(function, "name", "")
            if name.endswith("_wrong") == wrongly:
                found |= {
                    given[node.id] for node in ast.walk(function) if isinstance(node, ast.Name) and node.id in given
                }
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_used_rightly_and_wrongly(package: str) -> None:
    names = set(importlib.import_module(package).__all__)
    assert names - used(package, wrongly=False) == set()
    assert names - used(package, wrongly=True) - CANNOT_BE_USED_WRONGLY == set()


def test_every_wrong_line_says_what_is_wrong_with_it() -> None:
    for program in PROGRAMS:
        lines = program.read_text().splitlines()
        for function in ast.parse(program.read_text()).body:
            if getattr(function, "name", "").endswith("_wrong"):
                for statement in function.body:  # type: ignore[attr-defined]
                    assert "# type: ignore[" in lines[statement.end_lineno - 1], (program.name, statement.lineno)

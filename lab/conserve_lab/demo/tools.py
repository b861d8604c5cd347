"""The demo agent's tools: real files, a real database, real arithmetic.

Their schemas hold enums and bounded integers where an argument matters, so that any call that satisfies the schema is
a real and harmless call, also one made by a model that picks its words at random.
"""

from __future__ import annotations

import ast
import sqlite3
from contextlib import closing
from typing import Annotated, Literal

from langchain_core.tools import BaseTool, StructuredTool
from pydantic import Field

from conserve_lab.demo.workspace import FILES, Workspace

Folder = Literal["src", "tests", "docs"]
File = Literal[
    "src/orders.py",
    "src/invoices.py",
    "src/tax.py",
    "src/shipping.py",
    "tests/test_orders.py",
    "tests/test_tax.py",
    "docs/billing.md",
    "docs/changes.md",
]
Word = Literal["order", "invoice", "rate", "total", "customer", "refund", "TODO"]
Table = Literal["orders", "customers", "items"]
Column = Literal["name", "city", "amount"]
City = Literal["Basel", "Ghent", "Porto", "Turku", "York"]
Subject = Literal["cause", "repair", "question"]
Operation = Literal["add", "subtract", "multiply", "divide"]
Line = Annotated[int, Field(ge=1, le=20)]
Limit = Annotated[int, Field(ge=1, le=12)]
Number = Annotated[int, Field(ge=0, le=9_999)]
Short = Annotated[str, Field(max_length=40)]


class Toolbox:
    """The tools of one workspace, as methods; `tools()` gives them to LangChain."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def tools(self) -> list[BaseTool]:
        """Return the tools in a fixed order: the tools are the beginning of every prompt."""
        methods = (
            self.list_files,
            self.read_file,
            self.search_files,
            self.outline,
            self.query_table,
            self.sum_amounts,
            self.calculate,
            self.write_note,
        )
        return [StructuredTool.from_function(method) for method in methods]

    def list_files(self, folder: Folder) -> str:
        """List the files of a folder with their sizes in bytes."""
        files = sorted((self._workspace.root / folder).iterdir())
        return "\n".join(f"{folder}/{path.name}  {path.stat().st_size}" for path in files)

    def read_file(self, path: File, first_line: Line, line_count: Line) -> str:
        """Read some lines of a file."""
        lines = self._workspace.root.joinpath(path).read_text("utf-8").splitlines()
        chosen = lines[first_line - 1 : first_line - 1 + line_count]
        if not chosen:
            raise ValueError(f"{path} has only {len(lines)} lines: ask for an earlier one")
        return "\n".join(f"{number} {line}" for number, line in enumerate(chosen, first_line))

    def search_files(self, word: Word) -> str:
        """Find the lines that contain a word, in all files."""
        found = [
            f"{name}:{number}: {line.strip()}"
            for name in FILES
            for number, line in enumerate(self._workspace.root.joinpath(name).read_text("utf-8").splitlines(), 1)
            if word in line
        ]
        return "\n".join(found[:15]) or f"no line contains {word}"

    def outline(self, path: File) -> str:
        """Name the functions of a Python file."""
        text = self._workspace.root.joinpath(path).read_text("utf-8")
        if not path.endswith(".py"):
            raise ValueError(f"{path} is no Python file: read it instead")
        functions = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
        return "\n".join(f"{node.name} at line {node.lineno}" for node in functions)

    def query_table(self, table: Table, column: Column, city: City, limit: Limit) -> str:
        """Read one column of a database table for one city."""
        rows = self._rows(
            f"select id, {column} from {table} where city = ? order by id limit ?",  # noqa: S608 - both are enums
            (city, limit),
        )
        return "\n".join(f"{number}: {value}" for number, value in rows) or f"no {table} in {city}"

    def sum_amounts(self, table: Table, city: City) -> str:
        """Sum the amounts of a database table for one city."""
        rows = self._rows(f"select count(*), sum(amount) from {table} where city = ?", (city,))  # noqa: S608 - an enum
        return f"{rows[0][0]} rows, sum {rows[0][1] or 0}"

    def calculate(self, operation: Operation, left: Number, right: Number) -> str:
        """Do one step of integer arithmetic."""
        match operation:
            case "add":
                return str(left + right)
            case "subtract":
                return str(left - right)
            case "multiply":
                return str(left * right)
            case "divide":
                if right == 0:
                    raise ValueError("cannot divide by 0: choose another number")
                return str(left // right)

    def write_note(self, subject: Subject, text: Short) -> str:
        """Keep a note for later."""
        return f"kept as {self._workspace.add_note(subject, text).name}"

    def _rows(self, query: str, values: tuple[object, ...]) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(f"file:{self._workspace.database}?mode=ro", uri=True)) as connection:
            return connection.execute(query, values).fetchall()

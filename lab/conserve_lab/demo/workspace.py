"""The little world that one demo agent works in: a folder of source files, a folder for notes and a database."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

FILES = (
    "src/orders.py",
    "src/invoices.py",
    "src/tax.py",
    "src/shipping.py",
    "tests/test_orders.py",
    "tests/test_tax.py",
    "docs/billing.md",
    "docs/changes.md",
)
"""Files of every workspace; their text differs from one conversation to the next."""

TABLES = ("orders", "customers", "items")
CITIES = ("Basel", "Ghent", "Porto", "Turku", "York")
NOTES_MAX = 50
NOTE_CHARS_MAX = 2_000

_VERBS = ("round", "sum", "split", "check", "store", "load", "merge", "convert")
_NOUNS = ("order", "invoice", "line", "total", "rate", "customer", "refund", "parcel")


class Workspace:
    """Files and a database under one folder, made from a seed.

    Args:
        root: folder to create.
        seed: the same seed gives the same content.
    """

    def __init__(self, root: Path, *, seed: int) -> None:
        self.root = root
        self.notes = root / "notes"
        self.database = root / "shop.sqlite"
        chance = random.Random(seed)  # noqa: S311 - example data, not a secret
        self.notes.mkdir(parents=True)
        for name in FILES:
            path = root / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(_document(chance) if name.endswith(".md") else _module(chance), encoding="utf-8")
        with closing(sqlite3.connect(self.database)) as connection, connection:
            connection.execute("pragma synchronous = off")  # thrown away with the demo
            _fill(connection, chance)

    def add_note(self, subject: str, text: str) -> Path:
        """Write one note, shortened to a bound; the file's name is a number, whatever the subject says.

        Raises:
            ValueError: the workspace is full of notes.
        """
        number = sum(1 for _ in self.notes.iterdir()) + 1
        if number > NOTES_MAX:
            raise ValueError(f"no room for more than {NOTES_MAX} notes: read the ones you have")
        path = self.notes / f"{number:02}.md"
        path.write_text(f"# {subject[:80]}\n\n{text[:NOTE_CHARS_MAX]}\n", encoding="utf-8")
        return path


def _module(chance: random.Random) -> str:
    lines = ['"""Part of the shop."""', ""]
    for number in range(chance.randint(4, 7)):
        verb, noun = chance.choice(_VERBS), chance.choice(_NOUNS)
        rate = chance.randint(1, 99)
        lines += [
            f"def {verb}_{noun}_{number}(amount: int, rate: int = {rate}) -> int:",
            f"    # TODO: {chance.choice(_VERBS)} the {chance.choice(_NOUNS)} before the {noun}",
            f"    return amount * rate // {chance.choice((10, 100, 1000))}",
            "",
        ]
    return "\n".join(lines) + "\n"


def _document(chance: random.Random) -> str:
    facts = (
        f"- The {chance.choice(_NOUNS)} is {chance.choice(_VERBS)}ed after {chance.randint(2, 30)} days in "
        f"{chance.choice(CITIES)}."
        for _ in range(chance.randint(6, 10))
    )
    return "# Rules\n\n" + "\n".join(facts) + "\n"


def _fill(connection: sqlite3.Connection, chance: random.Random) -> None:
    connection.execute("create table customers (id integer primary key, name text, city text, amount integer)")
    connection.execute("create table orders (id integer primary key, name text, city text, amount integer)")
    connection.execute("create table items (id integer primary key, name text, city text, amount integer)")
    for table in TABLES:
        rows = [
            (f"{chance.choice(_NOUNS)}-{chance.randint(100, 999)}", chance.choice(CITIES), chance.randint(1, 5_000))
            for _ in range(40)
        ]
        connection.executemany(f"insert into {table} (name, city, amount) values (?, ?, ?)", rows)  # noqa: S608 - own name

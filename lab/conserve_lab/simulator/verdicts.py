"""Who beats whom in the rows of a comparison: dominated settings, ratios to the strongest reference, goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

OURS, STRONGEST, PUBLISHED = "default", "a2", "paper"
REFERENCES = ("a0", "a0-host", "a2")
MEASURES = ("ttfet_p95_norm", "tbt_p99_ms", "tbt_p999_ms")
TTFET_WITHIN = 1.05
TBT_BETTER = 1.2
FULL_WAIT_MS = 10_000


def family(row: Row) -> str:
    """The policy without its chunks."""
    return str(row["policy"]).partition("@")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How ours does at one workload and load.

    Attributes:
        dominated_by: settings of the references that are at least as good on all three measures.
        ratios: ours over the strongest reference, by measure; above 1 is worse.
        to_published: the same over the paper's rule; empty when it was not run.
        full: whether the fleet has no room (waits for admission, or a load of at least what it can take).
    """

    workload: str
    load: float
    saturation: float | None
    ours: Row
    dominated_by: tuple[str, ...]
    ratios: Mapping[str, float]
    to_published: Mapping[str, float]
    full: bool

    @property
    def worse_than_published(self) -> bool:
        """Whether the paper's rule is better on every measure."""
        return bool(self.to_published) and all(ratio > 1 for ratio in self.to_published.values())


def cells(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """Workloads and loads in their order."""
    return list(dict.fromkeys((str(row["workload"]), float(row["load"])) for row in rows))


def rows_of(rows: Sequence[Row], cell: tuple[str, float]) -> list[Row]:
    """The rows of one of them."""
    return [row for row in rows if (row["workload"], row["load"]) == cell]


def at_least_as_good(one: Row, other: Row) -> bool:
    """Whether one is on no measure worse than the other; what was not measured counts for nobody."""
    return all(_value(one, name) <= _value(other, name) for name in MEASURES)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """One verdict per workload and load at which ours and the strongest reference were run with their own chunks."""
    found = []
    for cell in cells(rows):
        mine = rows_of(rows, cell)
        by_name = {str(row["policy"]): row for row in mine}
        ours, strongest, published = by_name.get(OURS), by_name.get(STRONGEST), by_name.get(PUBLISHED)
        if ours is None or strongest is None:
            continue
        saturation = ours["settings"].get("saturation")
        waits_ms = max(ours["queue_wait_p95_ms"], strongest["queue_wait_p95_ms"])
        found.append(
            Verdict(
                workload=cell[0],
                load=cell[1],
                saturation=saturation,
                ours=ours,
                dominated_by=tuple(
                    str(row["policy"]) for row in mine if family(row) in REFERENCES and at_least_as_good(row, ours)
                ),
                ratios=_ratios(ours, strongest),
                to_published={} if published is None else _ratios(ours, published),
                full=waits_ms >= FULL_WAIT_MS or (saturation is not None and saturation >= 1),
            )
        )
    return found


def goals(found: Sequence[Verdict]) -> list[tuple[str, int, int]]:
    """What we set out for: a sentence, at how many workloads and loads it holds, and of how many."""
    roomy = [verdict for verdict in found if not verdict.full]
    compared = [verdict for verdict in found if verdict.to_published]
    return [
        (
            "no setting of the references is at least as good on TTFET p95, TBT p99 and TBT p99.9",
            sum(not verdict.dominated_by for verdict in found),
            len(found),
        ),
        (
            "below saturation, TTFET p95 within 5 % of A2",
            sum(verdict.ratios["ttfet_p95_norm"] <= TTFET_WITHIN for verdict in roomy),
            len(roomy),
        ),
        (
            "below saturation, TBT p99 at least 1.2 times better than A2",
            sum(verdict.ratios["tbt_p99_ms"] * TBT_BETTER <= 1 for verdict in roomy),
            len(roomy),
        ),
        (
            "the paper's rule is not better on all three",
            sum(not verdict.worse_than_published for verdict in compared),
            len(compared),
        ),
    ]


def _ratios(ours: Row, other: Row) -> dict[str, float]:
    return {name: _value(ours, name) / _value(other, name) for name in (*MEASURES, "joules_per_output_token")}


def _value(row: Row, name: str) -> float:
    """A measure; a workload whose last turns have one token has no time between tokens."""
    value = row[name]
    return 1.0 if value is None else max(float(value), 1e-9)

"""Several repetitions of the same figures as one: medians, and their spread beside them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from conserve_lab.replay import spread_of

Figures = dict[str, Any]


def merged(repetitions: Sequence[Figures]) -> Figures:
    """Return the median of every number; None where a repetition has none."""
    return {key: _middle([each[key] for each in repetitions]) for key in repetitions[0]}


def spreads(repetitions: Sequence[Figures], *, prefix: str = "") -> Figures:
    """Return how far every number spreads, by its dotted name."""
    found: Figures = {}
    for key, value in repetitions[0].items():
        values = [each[key] for each in repetitions]
        if isinstance(value, dict):
            found |= spreads(values, prefix=f"{prefix}{key}.")
        elif all(isinstance(each, int | float) for each in values):
            found[prefix + key] = spread_of(values)
    return found


def _middle(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return merged(values)
    if any(not isinstance(value, int | float) for value in values):
        return None
    middle = statistics.median(values)
    return int(middle) if middle == int(middle) else round(middle, 2)

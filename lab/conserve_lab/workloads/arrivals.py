"""When conversations arrive."""

from __future__ import annotations

import random
from collections.abc import Iterator


def poisson_arrivals(count: int, *, per_s: float, seed: int) -> Iterator[int]:
    """Yield `count` arrival instants in microseconds, `per_s` a second on average; the same for the same seed."""
    draw = random.Random(f"arrivals {seed}")  # noqa: S311 -- a workload, not a secret
    at_us = 0
    for _ in range(count):
        at_us += round(draw.expovariate(per_s) * 1_000_000)
        yield at_us

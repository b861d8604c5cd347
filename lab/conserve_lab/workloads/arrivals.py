"""When conversations arrive."""

from __future__ import annotations

import random
from collections.abc import Iterator


def poisson_arrivals(count: int, *, per_s: float, seed: int, burst: int = 1) -> Iterator[int]:
    """Yield `count` arrival instants in microseconds, `per_s` a second on average; the same for the same seed.

    With `burst` above 1 so many arrive at one instant, and so many times less often.
    """
    draw = random.Random(f"arrivals {seed}")  # noqa: S311 -- a workload, not a secret
    at_us = 0
    for number in range(count):
        if number % burst == 0:
            at_us += round(draw.expovariate(per_s / burst) * 1_000_000)
        yield at_us

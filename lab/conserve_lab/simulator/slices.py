"""Long prompts in slices: each a request of its own that leaves its KV in the engine's prefix cache for the next one.

An engine computes one prompt after the other, so whoever comes behind a long one waits for all of it. Between two
slices it takes whoever is first: by priority, so that short prompts pass, and long ones stay in the order in which they
arrived (two at a time share the engine: while the next slice of one is on its way, the other's runs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def one_by_one(steps: Sequence[int], send: Callable[[int, Callable[[], None]], None], then: Callable[[], None]) -> None:
    """Send the slices one after the other, each when the last one is done; then go on."""

    def go(number: int) -> None:
        if number == len(steps):
            then()
        else:
            send(steps[number], lambda: go(number + 1))

    go(0)

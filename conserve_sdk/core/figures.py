"""What the last grants of each model looked like: waits and first turns, for the advice to operators."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from conserve_sdk.core.units import ModelName, Ms, Tokens

GRANTS_REMEMBERED = 256


def _recent() -> deque[int]:
    return deque(maxlen=GRANTS_REMEMBERED)


@dataclass(slots=True)
class _Recent:
    waits_ms: deque[int] = field(default_factory=_recent)
    first_turns: deque[int] = field(default_factory=_recent)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantFigures:
    """Percentiles over the last grants of one model; 0 where there were none.

    Attributes:
        grants: how many they are, at most `GRANTS_REMEMBERED`.
        wait_p95_ms: time in the admission queue.
        first_turn_p50_tokens: uncached tokens of the first turns.
    """

    grants: int
    wait_p95_ms: Ms
    first_turn_p50_tokens: Tokens


class Figures:
    """The last grants of first turns, by model."""

    def __init__(self) -> None:
        self._recent: dict[ModelName, _Recent] = {}

    def granted(self, model: ModelName, *, waited_ms: int, uncached_tokens: int) -> None:
        """A conversation was granted its lease."""
        recent = self._recent.setdefault(model, _Recent())
        recent.waits_ms.append(waited_ms)
        recent.first_turns.append(uncached_tokens)

    def of(self, model: ModelName) -> GrantFigures:
        """The percentiles now."""
        recent = self._recent.get(model, _Recent())
        return GrantFigures(
            grants=len(recent.waits_ms),
            wait_p95_ms=Ms(_percentile(recent.waits_ms, 95)),
            first_turn_p50_tokens=Tokens(_percentile(recent.first_turns, 50)),
        )


def _percentile(values: deque[int], percent: int) -> int:
    """Nearest rank: the smallest value that at least so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[-(-len(ordered) * percent // 100) - 1] if ordered else 0

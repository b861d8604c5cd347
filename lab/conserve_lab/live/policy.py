"""How a trace is scheduled in a replay."""

from __future__ import annotations

from enum import StrEnum


class Policy(StrEnum):
    """How a trace is scheduled in a replay."""

    CONSERVE = "conserve"
    PER_TURN = "per-turn"
    AFFINITY = "affinity"

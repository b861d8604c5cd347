"""One turn, from the application's request to the engine's first byte, without doing any I/O.

A turn is a generator that yields what it needs (`effects`) and is resumed with the answer; `conserve_sdk._drive` holds
the two loops, blocking and async, that perform them. So every rule stands here once and in one colour.
"""

from __future__ import annotations

from conserve_sdk._turn.budget import Budget, Timeouts
from conserve_sdk._turn.effects import (
    Acquire,
    Discard,
    Effect,
    Fetch,
    Fetched,
    Flow,
    ListEngines,
    Open,
    Opened,
    Park,
    Release,
    Supersede,
    Wait,
)
from conserve_sdk._turn.flow import Answer, TurnFlow
from conserve_sdk._turn.kit import TurnKit, TurnOptions
from conserve_sdk._turn.ledger import ActiveTurn
from conserve_sdk._turn.lifecycle import park_flow, release_all_flow, release_flow
from conserve_sdk._turn.planner import LeasePlanner, TurnPlan, TurnPlanner
from conserve_sdk._turn.relay import relay_flow

__all__ = [
    "Acquire",
    "ActiveTurn",
    "Answer",
    "Budget",
    "Discard",
    "Effect",
    "Fetch",
    "Fetched",
    "Flow",
    "LeasePlanner",
    "ListEngines",
    "Open",
    "Opened",
    "Park",
    "Release",
    "Supersede",
    "Timeouts",
    "TurnFlow",
    "TurnKit",
    "TurnOptions",
    "TurnPlan",
    "TurnPlanner",
    "Wait",
    "park_flow",
    "relay_flow",
    "release_all_flow",
    "release_flow",
]

"""The broker's desk without I/O: wire models in, core events through, answers and durable changes out.

`conserve_broker` puts HTTP, a clock and a journal round it; `conserve_sdk.testing.InMemoryBroker` puts a fake clock
round it. Every rule of the protocol that is not the core's stands here once: routes, codes, tokens, re-adoption.
"""

from conserve_sdk._desk.desk import Desk
from conserve_sdk._desk.outcome import Call, Outcome, Reply, lease_token_in, query_as_body
from conserve_sdk._desk.problems import ProblemRaised, no_route, problem, too_large
from conserve_sdk._desk.routes import ROUTES, Route, Scope, find_route
from conserve_sdk._desk.visit import NewId
from conserve_sdk._desk.wire import engine_info, fleet_info

__all__ = [
    "ROUTES",
    "Call",
    "Desk",
    "NewId",
    "Outcome",
    "ProblemRaised",
    "Reply",
    "Route",
    "Scope",
    "engine_info",
    "find_route",
    "fleet_info",
    "lease_token_in",
    "no_route",
    "problem",
    "query_as_body",
    "too_large",
]

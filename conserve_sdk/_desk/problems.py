"""Problem documents (RFC 9457): one stable `code` per cause, one line that says what to do."""

from __future__ import annotations

from pydantic import ValidationError

from conserve_sdk._desk.outcome import Reply
from conserve_sdk._desk.wire import decision_info
from conserve_sdk.core.decisions import Refused
from conserve_sdk.core.units import EngineId, LeaseId
from conserve_sdk.core.vocabulary import RefusalReason
from conserve_sdk.protocol import Problem

_REFUSED = {
    RefusalReason.NO_CAPACITY: (503, "No decoder has room"),
    RefusalReason.NO_READY_ENGINE: (503, "No engine is ready"),
    RefusalReason.UNKNOWN_MODEL: (404, "Unknown model"),
    RefusalReason.PROMPT_TOO_LONG: (422, "Prompt too long"),
    RefusalReason.QUEUE_FULL: (429, "Too many requests wait"),
    RefusalReason.OVER_QUOTA: (429, "Over the tenant's quota"),
    RefusalReason.TOO_MANY_LEASES: (429, "Too many leases"),
}
_FIELDS_SHOWN = 3


class ProblemRaised(Exception):  # noqa: N818 - carries an answer; nothing broke
    """Ends a call early with a problem document."""

    def __init__(self, problem: Problem, *, challenge: str = "") -> None:
        super().__init__(f"{problem.status} {problem.code}: {problem.detail}")
        self.problem = problem
        self.challenge = challenge

    @property
    def reply(self) -> Reply:
        """The problem as an answer."""
        return Reply(status=self.problem.status, body=self.problem, challenge=self.challenge)


def problem(status: int, *, code: str, title: str, detail: str, retry_after_ms: int | None = None) -> ProblemRaised:
    """A problem ready to be raised."""
    return ProblemRaised(Problem(title=title, status=status, detail=detail, code=code, retry_after_ms=retry_after_ms))


def refused(refusal: Refused) -> Reply:
    """The core's refusal of a grant, with the receipt that explains it."""
    status, title = _REFUSED[refusal.reason]
    return Reply(
        status=status,
        body=Problem(
            title=title,
            status=status,
            detail=refusal.detail,
            code=refusal.reason.value,
            retry_after_ms=refusal.retry_after_ms or None,
            decision=decision_info(refusal.receipt),
        ),
    )


def bad_body(error: ValidationError) -> ProblemRaised:
    """400 for what is no JSON, 422 for JSON of the wrong shape; the detail names the fields."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    if faults[0]["type"] == "json_invalid":
        return problem(400, code="bad_request", title="Not JSON", detail=f"the body is not JSON: {faults[0]['msg']}")
    lines = [f"{'.'.join(str(part) for part in fault['loc']) or 'body'}: {fault['msg']}" for fault in faults]
    more = f" (and {len(lines) - _FIELDS_SHOWN} more)" if len(lines) > _FIELDS_SHOWN else ""
    return problem(422, code="bad_request", title="Invalid request", detail="; ".join(lines[:_FIELDS_SHOWN]) + more)


def bad_request(detail: str) -> ProblemRaised:
    """422 for a body whose fields contradict each other."""
    return problem(422, code="bad_request", title="Invalid request", detail=detail)


def bad_token(detail: str) -> ProblemRaised:
    """401: no token, a forged one, or one of another lease or tenant."""
    return problem(401, code="bad_token", title="Not the holder of this lease", detail=detail)


def lease_unknown(lease_id: str) -> ProblemRaised:
    """404: never granted here, released or expired."""
    return problem(
        404,
        code="lease_unknown",
        title="No such live lease",
        detail=f"lease {lease_id} was released or expired, or was never granted here; ask for a new one",
    )


def lease_superseded(lease_id: LeaseId, *, successor: LeaseId) -> ProblemRaised:
    """409: another lease of the key took over."""
    return problem(
        409,
        code="lease_superseded",
        title="Superseded lease",
        detail=f"lease {lease_id} was superseded by {successor}; ask for the live one",
    )


def engine_unknown(engine_id: str, known: list[EngineId]) -> ProblemRaised:
    """404: no engine of that id is configured."""
    names = ", ".join(known) if known else "none is configured"
    return problem(
        404, code="engine_unknown", title="No such engine", detail=f"no engine {engine_id!r}; engines: {names}"
    )


def no_route(method: str, path: str, allowed: list[str]) -> ProblemRaised:
    """404 for an unknown path, 405 where other methods are allowed on it."""
    if allowed:
        detail = f"{method} is not allowed on {path}; allowed: {', '.join(allowed)}"
        return problem(405, code="method_not_allowed", title="Method not allowed", detail=detail)
    detail = f"no route {path}; the routes are listed at /openapi.json"
    return problem(404, code="not_found", title="Not found", detail=detail)


def too_large(limit_bytes: int) -> ProblemRaised:
    """413: the body is longer than the broker reads."""
    detail = f"the body is longer than {limit_bytes} bytes; send smaller batches"
    return problem(413, code="body_too_large", title="Body too large", detail=detail)

"""Requests to the broker and the reading of its answers, without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar
from urllib.parse import quote

import httpx2
import pydantic

from conserve_sdk.core.vocabulary import RefusalReason
from conserve_sdk.errors import (
    AccessDenied,
    BrokerError,
    BrokerUnavailable,
    ConServeError,
    LeaseExpired,
    LeaseLost,
    LeaseRefused,
    ProtocolError,
    RateLimited,
)
from conserve_sdk.protocol import (
    LEASE_HEADER,
    BatchAnswer,
    EngineList,
    LeaseGrant,
    LeaseRequest,
    LeaseStatus,
    Problem,
    RenewalBatch,
    ReportBatch,
    SupersedeRequest,
    TokenBody,
)

__all__ = [
    "Answer",
    "BrokerCall",
    "TryAgain",
    "acquire_call",
    "check",
    "engines_call",
    "park_call",
    "parse_batch",
    "parse_engines",
    "parse_grant",
    "parse_status",
    "release_call",
    "renew_call",
    "report_call",
    "supersede_call",
]

ANSWER_TIMEOUT_MS = 5_000
"""A broker that answers later than this (beyond the wait it was asked for) counts as down."""

_M = TypeVar("_M", bound=pydantic.BaseModel)

_REFUSALS = frozenset(reason.value for reason in RefusalReason)
_DENIED = frozenset({"key_missing", "key_unknown", "key_expired", "scope_missing"})
_RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerCall:
    """One request to the broker, not yet sent.

    Attributes:
        timeout_ms: how long its answer may take.
        conversation_id, lease_id: what it is about, for errors.
    """

    method: str
    path: str
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    timeout_ms: int = ANSWER_TIMEOUT_MS
    conversation_id: str | None = None
    lease_id: str | None = None


class Answer(NamedTuple):
    """The answer to a call: its head, and its body, read."""

    head: httpx2.Response
    content: bytes


class TryAgain(Exception):  # noqa: N818 -- a signal between the attempts of one call, never seen outside
    """This attempt failed, another one may not.

    Attributes:
        error: what to raise when there is no time left.
        retry_after_ms: the broker's wish, 0 without one.
        refusal: the broker itself is well; it refused for now.
        throttled: the broker itself is well, but we ask too often.
        gone: nobody took the connection.
    """

    def __init__(
        self,
        error: BrokerError,
        *,
        retry_after_ms: int = 0,
        refusal: bool = False,
        throttled: bool = False,
        gone: bool = False,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after_ms = retry_after_ms
        self.refusal = refusal
        self.throttled = throttled
        self.gone = gone


def acquire_call(request: LeaseRequest, *, wait_ms: int, trace: Mapping[str, str] | None = None) -> BrokerCall:
    """`POST /v1/leases`, with what is left of the patience as `wait_ms`."""
    body = request.model_copy(update={"wait_ms": wait_ms})
    return _post("/v1/leases", body, wait_ms=wait_ms, conversation_id=request.conversation_id, trace=trace)


def supersede_call(
    lease_id: str, request: SupersedeRequest, *, wait_ms: int, trace: Mapping[str, str] | None = None
) -> BrokerCall:
    """`POST /v1/leases/{id}/supersede`."""
    body = request.model_copy(update={"wait_ms": wait_ms})
    return _post(f"{_lease_path(lease_id)}/supersede", body, wait_ms=wait_ms, lease_id=lease_id, trace=trace)


def park_call(lease_id: str, token: str) -> BrokerCall:
    """`POST /v1/leases/{id}/park`."""
    return _post(f"{_lease_path(lease_id)}/park", TokenBody(token=token), lease_id=lease_id)


def release_call(lease_id: str, token: str) -> BrokerCall:
    """`DELETE /v1/leases/{id}`: the token stands in the header, as a DELETE has no body."""
    return BrokerCall(method="DELETE", path=_lease_path(lease_id), headers={LEASE_HEADER: token}, lease_id=lease_id)


def report_call(batch: ReportBatch) -> BrokerCall:
    """`POST /v1/reports`."""
    return _post("/v1/reports", batch)


def renew_call(batch: RenewalBatch) -> BrokerCall:
    """`POST /v1/renewals`."""
    return _post("/v1/renewals", batch)


def engines_call() -> BrokerCall:
    """`GET /v1/engines`."""
    return BrokerCall(method="GET", path="/v1/engines")


def parse_engines(call: BrokerCall, answer: Answer) -> EngineList:
    """Read the list of engines.

    Raises:
        TryAgain, ConServeError: see `check`.
    """
    return _read(EngineList, call, answer)


def parse_grant(call: BrokerCall, answer: Answer) -> LeaseGrant:
    """Read a grant.

    Raises:
        TryAgain, ConServeError: see `check`.
    """
    return _read(LeaseGrant, call, answer)


def parse_status(call: BrokerCall, answer: Answer) -> LeaseStatus:
    """Read the answer to a park.

    Raises:
        TryAgain, ConServeError: see `check`.
    """
    return _read(LeaseStatus, call, answer)


def parse_batch(call: BrokerCall, answer: Answer, *, expected: int) -> BatchAnswer:
    """Read the answer to a batch of `expected` reports or renewals.

    Raises:
        TryAgain, ConServeError: see `check`.
    """
    batch = _read(BatchAnswer, call, answer)
    if len(batch.results) != expected:
        raise ProtocolError(
            f"the broker gave {len(batch.results)} results for {expected} entries: use a broker of this version",
            broker_url=_origin(answer),
            status=answer.head.status_code,
        )
    return batch


def check(call: BrokerCall, answer: Answer) -> None:
    """Return if the broker said yes.

    Raises:
        TryAgain: it said "not now".
        LeaseExpired, LeaseLost, LeaseRefused, AccessDenied, ProtocolError: it said no.
    """
    if answer.head.is_success:
        return
    problem = _problem(answer)
    retry_after_ms = _retry_after_ms(answer, problem)
    if problem.code in _REFUSALS:
        refused = LeaseRefused(
            f"the broker refused a lease: {problem.detail}",
            reason=problem.code,
            retry_after_ms=retry_after_ms,
            conversation_id=call.conversation_id,
            lease_id=call.lease_id,
            broker_url=_origin(answer),
            status=answer.head.status_code,
            code=problem.code,
        )
        raise TryAgain(refused, retry_after_ms=retry_after_ms, refusal=True) if retry_after_ms else refused
    raise _failure(call, answer, problem, retry_after_ms)


def _read(kind: type[_M], call: BrokerCall, answer: Answer) -> _M:
    check(call, answer)
    try:
        return kind.model_validate_json(answer.content)
    except pydantic.ValidationError as exc:
        raise _not_understood(call, answer, exc) from exc


def _failure(call: BrokerCall, answer: Answer, problem: Problem, retry_after_ms: int) -> TryAgain | ConServeError:
    detail, lease_id = problem.detail or problem.title, call.lease_id
    about = {
        "conversation_id": call.conversation_id,
        "lease_id": lease_id,
        "broker_url": _origin(answer),
        "code": problem.code,
    }
    if problem.code in _DENIED:
        how = "set broker_api_key= or CONSERVE_BROKER_API_KEY"
        return AccessDenied(f"the broker denies access: {detail} ({how})", status=answer.head.status_code, **about)
    if problem.code == "rate_limited":
        slow = RateLimited(
            f"the broker is asked too often: {detail}",
            retry_after_ms=retry_after_ms,
            status=answer.head.status_code,
            **about,
        )
        return TryAgain(slow, retry_after_ms=retry_after_ms, throttled=True)
    if problem.code == "lease_unknown":
        return LeaseExpired(f"the lease is not live any more: {detail}", lease_id=lease_id)
    if problem.code in ("lease_superseded", "engine_lost", "bad_token"):
        return LeaseLost(f"the lease is lost: {detail}", lease_id=lease_id)
    if answer.head.status_code in _RETRYABLE:
        unavailable = BrokerUnavailable(
            f"the broker cannot answer now: {detail}", status=answer.head.status_code, **about
        )
        return TryAgain(unavailable, retry_after_ms=retry_after_ms)
    return ProtocolError(
        f"the broker rejected {call.method} {call.path}: {detail}", status=answer.head.status_code, **about
    )


def _post(
    path: str,
    body: pydantic.BaseModel,
    *,
    wait_ms: int = 0,
    conversation_id: str | None = None,
    lease_id: str | None = None,
    trace: Mapping[str, str] | None = None,
) -> BrokerCall:
    return BrokerCall(
        method="POST",
        path=path,
        content=body.model_dump_json().encode(),
        headers={"Content-Type": "application/json", **(trace or {})},
        timeout_ms=wait_ms + ANSWER_TIMEOUT_MS,
        conversation_id=conversation_id,
        lease_id=lease_id,
    )


def _lease_path(lease_id: str) -> str:
    return f"/v1/leases/{quote(lease_id, safe='')}"


def _problem(answer: Answer) -> Problem:
    try:
        return Problem.model_validate_json(answer.content)
    except pydantic.ValidationError:  # not one of ours: a proxy's page, or another server on that port
        detail = f"HTTP {answer.head.status_code} without a problem document: is this URL a ConServe broker?"
        return Problem(title=answer.head.reason_phrase, status=answer.head.status_code, detail=detail, code="")


def _retry_after_ms(answer: Answer, problem: Problem) -> int:
    if problem.retry_after_ms is not None:
        return max(0, problem.retry_after_ms)
    header = answer.head.headers.get("Retry-After", "")
    return int(header) * 1000 if header.isascii() and header.isdigit() else 0


def _not_understood(call: BrokerCall, answer: Answer, exc: pydantic.ValidationError) -> ProtocolError:
    first = exc.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the body"
    return ProtocolError(
        f"the broker's answer to {call.method} {call.path} is not understood ({where}: {first['msg']}): "
        "use a broker and an SDK of the same protocol version",
        conversation_id=call.conversation_id,
        lease_id=call.lease_id,
        broker_url=_origin(answer),
        status=answer.head.status_code,
    )


def _origin(answer: Answer) -> str:
    return str(answer.head.request.url.copy_with(raw_path=b"/")).rstrip("/")

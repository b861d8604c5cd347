"""Handlers of the two batches: reports and renewals. Each entry stands alone; one bad token spoils nothing else."""

from __future__ import annotations

from conserve_sdk._desk.leases import status_of
from conserve_sdk._desk.outcome import Reply
from conserve_sdk._desk.problems import ProblemRaised
from conserve_sdk._desk.visit import HolderEvent, Visit
from conserve_sdk.core.events import EngineFailureReported, LeaseRenewed, TurnFinished, TurnStarted
from conserve_sdk.core.lease import Lease
from conserve_sdk.core.units import MILLION, EngineId, Incarnation, Ms, Tokens
from conserve_sdk.protocol import (
    BatchAnswer,
    EngineFailureReport,
    LeaseStatus,
    RenewalBatch,
    ReportBatch,
    TurnFinishedReport,
    TurnStartedReport,
)
from conserve_sdk.tokens import LeaseClaims, TokenError, read_unverified

AnyReport = TurnStartedReport | TurnFinishedReport | EngineFailureReport


def take_reports(visit: Visit, body: ReportBatch) -> Reply:
    """`POST /v1/reports`."""
    return Reply(status=200, body=BatchAnswer(results=tuple([_reported(visit, report) for report in body.reports])))


def renew_leases(visit: Visit, body: RenewalBatch) -> Reply:
    """`POST /v1/renewals`. The leases that are live here first, all at once; then those whose tokens must explain."""
    found = [visit.live_lease_of(token) for token in body.tokens]
    answers = iter(visit.renew([each[1].lease_id for each in found if each is not None]))
    live = [None if each is None else status_of(visit, each[0], next(answers)) for each in found]
    results = [status or _renewed(visit, token) for token, status in zip(body.tokens, live, strict=True)]
    return Reply(status=200, body=BatchAnswer(results=tuple(results)))


def _reported(visit: Visit, report: AnyReport) -> LeaseStatus:
    found = visit.live_lease_of(report.token)
    if found is not None:
        held, lease = found
        if isinstance(report, EngineFailureReport) and not _accuse(visit, lease, report):
            return LeaseStatus(lease_id=lease.lease_id, verdict="bad_token")
        return status_of(visit, held, visit.answer(lease.lease_id, _event_of(visit, lease, report)))
    try:
        claims = visit.claims(report.token)
    except ProblemRaised as problem:
        return _rejected(report.token, problem)
    if isinstance(report, EngineFailureReport) and not _accuse(visit, claims, report):
        return LeaseStatus(lease_id=claims.lease_id, verdict="bad_token")
    return status_of(visit, claims, visit.tell(claims, _event_of(visit, claims, report)))


def _accuse(visit: Visit, holder: Lease | LeaseClaims, report: EngineFailureReport) -> bool:
    """Tell the core of an engine that failed; False for one that the lease does not bind.

    Else any holder could empty the fleet.
    """
    if not holder.names_engine(report.engine_id):
        return False
    visit.apply(
        EngineFailureReported(
            now_ms=visit.now_ms,
            engine_id=EngineId(report.engine_id),
            incarnation=Incarnation(report.incarnation),
            detail=f"{report.phase}: {report.detail}" if report.detail else report.phase,
        )
    )
    return True


def _renewed(visit: Visit, token: str) -> LeaseStatus:
    try:
        claims = visit.claims(token)
    except ProblemRaised as problem:
        return _rejected(token, problem)
    event = LeaseRenewed(now_ms=visit.now_ms, lease_id=claims.lease_id)
    return status_of(visit, claims, visit.tell(claims, event))


def _event_of(visit: Visit, holder: Lease | LeaseClaims, report: AnyReport) -> HolderEvent:
    now_ms, lease_id = visit.now_ms, holder.lease_id
    if isinstance(report, TurnStartedReport):
        return TurnStarted(now_ms=now_ms, lease_id=lease_id, input_tokens=Tokens(report.input_tokens))
    if isinstance(report, EngineFailureReport):
        return LeaseRenewed(now_ms=now_ms, lease_id=lease_id)  # a sign of life, like every report
    prefill_engine_id = report.prefill_engine_id
    if prefill_engine_id is not None and not holder.names_engine(prefill_engine_id):
        prefill_engine_id = None  # what the lease does not bind, its holder cannot have measured
    return TurnFinished(
        now_ms=now_ms,
        lease_id=lease_id,
        context_tokens=Tokens(report.prompt_tokens + report.completion_tokens) or _estimated(visit, holder, report),
        prompt_tokens=Tokens(report.prompt_tokens),
        prompt_bytes=report.prompt_bytes,
        cached_tokens=Tokens(report.cached_tokens),
        prefill_ms=Ms(report.prefill_ms),
        prefill_engine_id=None if prefill_engine_id is None else EngineId(prefill_engine_id),
        migrated=report.migrated,
        idle=report.idle,
    )


def _estimated(visit: Visit, holder: Lease | LeaseClaims, report: TurnFinishedReport) -> Tokens:
    """The context of a turn without usage (a stream that did not ask for it): what its bytes come to; 0 without any.

    Never less than the ledger says: a guess frees no room.
    """
    model = holder.key.model if isinstance(holder, Lease) else holder.model
    guess = -(-report.prompt_bytes * visit.core.tokens_per_byte_ppm(model) // MILLION)
    return Tokens(max(guess, holder.ledger_tokens)) if guess else Tokens(0)


def _rejected(token: str, raised: ProblemRaised) -> LeaseStatus:
    try:
        lease_id = str(read_unverified(token).lease_id)
    except TokenError:
        lease_id = ""
    return LeaseStatus(lease_id=lease_id, verdict="unknown" if raised.problem.code == "lease_unknown" else "bad_token")

"""Handlers of the routes of leases: grant, read, explain, supersede, park, release."""

from __future__ import annotations

from conserve_sdk._desk.outcome import Reply
from conserve_sdk._desk.problems import bad_request, bad_token, lease_superseded, lease_unknown
from conserve_sdk._desk.visit import Visit
from conserve_sdk._desk.wire import explanation, lease_grant
from conserve_sdk._desk.words import in_words
from conserve_sdk.core.decisions import LeaseAnswered
from conserve_sdk.core.events import LeaseParked, LeaseReleased, LeaseRequested, SupersedeRequested
from conserve_sdk.core.lease import LeaseKey
from conserve_sdk.core.units import (
    ConversationId,
    EngineId,
    LeaseId,
    LineageId,
    ModelName,
    Ms,
    PrefixKey,
    RequestId,
    Tokens,
)
from conserve_sdk.core.vocabulary import LeaseVerdict, MoveReason, SupersedeCause
from conserve_sdk.protocol import LeaseRequest, LeaseStatus, SupersedeRequest, TokenBody
from conserve_sdk.tokens import HeldToken, LeaseClaims


def request_lease(visit: Visit, body: LeaseRequest) -> Reply | RequestId:
    """`POST /v1/leases`."""
    request_id = visit.new_request_id()
    visit.apply(
        LeaseRequested(
            now_ms=visit.now_ms,
            request_id=request_id,
            lease_id=visit.new_lease_id(),
            key=LeaseKey(
                tenant=visit.call.tenant,
                conversation_id=ConversationId(body.conversation_id),
                lineage=LineageId(body.lineage),
                model=ModelName(body.model),
            ),
            first_turn_input_tokens=Tokens(body.first_turn_input_tokens),
            first_turn_input_bytes=body.first_turn_input_bytes,
            deadline_at_ms=Ms(visit.now_ms + body.wait_ms),
            hint=None if body.hint_engine_id is None else EngineId(body.hint_engine_id),
            parent_lease_id=None if body.parent_lease_id is None else LeaseId(body.parent_lease_id),
            prefix_key=PrefixKey(body.prefix_key or ""),
        )
    )
    return visit.settled(request_id)


def supersede_lease(visit: Visit, body: SupersedeRequest) -> Reply | RequestId:
    """`POST /v1/leases/{id}/supersede`. The key comes from the token, so a broker without state can answer too."""
    claims = visit.claims(body.token, lease_id=visit.call.target)
    if body.epoch != claims.epoch:
        raise bad_request(f"epoch: lease {claims.lease_id} has epoch {claims.epoch}, not {body.epoch}")
    request_id = visit.new_request_id()
    visit.apply(
        SupersedeRequested(
            now_ms=visit.now_ms,
            request_id=request_id,
            lease_id=claims.lease_id,
            new_lease_id=visit.new_lease_id(),
            key=_key_of(claims),
            epoch=body.epoch,
            reason=body.reason,
            first_turn_input_tokens=Tokens(body.first_turn_input_tokens),
            first_turn_input_bytes=body.first_turn_input_bytes,
            deadline_at_ms=Ms(visit.now_ms + body.wait_ms),
            failed_engine_id=None if body.failed_engine_id is None else EngineId(body.failed_engine_id),
            cause=SupersedeCause(body.cause),
            cached_tokens=Tokens(body.cached_tokens),
        )
    )
    return visit.settled(request_id)


def read_lease(visit: Visit, _: None) -> Reply:
    """`GET /v1/leases/{id}`, for its holder. Reading extends nothing and re-adopts nothing."""
    claims = visit.claims(_header_token(visit), lease_id=visit.call.target)
    lease = visit.core.lease(claims.lease_id)
    if lease is None:
        live = visit.core.live_lease_of(_key_of(claims))
        if live is not None and live.epoch > claims.epoch:
            raise lease_superseded(claims.lease_id, successor=live.lease_id)
        raise lease_unknown(claims.lease_id)
    token = visit.fresh_token(lease, claims) or visit.call.lease_token
    return Reply(status=200, body=lease_grant(lease, token=token, now_ms=visit.now_ms, reused=True))


def explain_lease(visit: Visit, _: None) -> Reply:
    """`GET /v1/leases/{id}/explain`, for operators: no token needed, none shown.

    A lease of another tenant is none: its very existence is not told.
    """
    lease = visit.core.lease(LeaseId(visit.call.target))
    if lease is None or not (visit.call.every_tenant or lease.key.tenant == visit.call.tenant):
        raise lease_unknown(visit.call.target[:64])
    found = explanation(lease, visit.core, now_ms=visit.now_ms)
    return Reply(status=200, body=found.model_copy(update={"in_words": in_words(found)}))


def park_lease(visit: Visit, body: TokenBody) -> Reply:
    """`POST /v1/leases/{id}/park`."""
    claims = visit.claims(body.token, lease_id=visit.call.target)
    answer = visit.tell(claims, LeaseParked(now_ms=visit.now_ms, lease_id=claims.lease_id))
    return Reply(status=200, body=status_of(visit, claims, answer))


def release_lease(visit: Visit, _: None) -> Reply:
    """`DELETE /v1/leases/{id}`. Idempotent: what is gone already answers as if it had been released now."""
    claims = visit.claims(_header_token(visit), lease_id=visit.call.target)
    # A broker without state re-adopts even here, so that the release is remembered against other holders' renewals.
    visit.tell(claims, LeaseReleased(now_ms=visit.now_ms, lease_id=claims.lease_id))
    return Reply(status=204)


def status_of(visit: Visit, claims: LeaseClaims | HeldToken, answer: LeaseAnswered) -> LeaseStatus:
    """What became of one word from a holder, with a fresh token where one is due."""
    if answer.verdict is not LeaseVerdict.OK:
        return LeaseStatus(lease_id=claims.lease_id, verdict=answer.verdict.value)
    lease = answer.lease
    assert lease is not None, "an OK verdict names its lease"
    news = {} if answer.move_reason is None else _directive(answer.move_reason)
    return LeaseStatus(
        lease_id=claims.lease_id,
        verdict="ok",
        expires_in_ms=lease.expires_at_ms - visit.now_ms,
        token=visit.fresh_token(lease, claims),
        **news,
    )


def _directive(reason: MoveReason) -> dict[str, str]:
    return {"directive": "re_lease", "directive_reason": reason.value}


def _header_token(visit: Visit) -> str:
    if not visit.call.lease_token:
        raise bad_token("send the lease's token in the header `X-ConServe-Lease`")
    return visit.call.lease_token


def _key_of(claims: LeaseClaims) -> LeaseKey:
    return LeaseKey(
        tenant=claims.tenant, conversation_id=claims.conversation_id, lineage=claims.lineage, model=claims.model
    )

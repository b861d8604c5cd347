"""One call or event at the desk: applies events to the core, checks tokens, gathers what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from conserve_sdk._desk.outcome import Call, Outcome, Reply
from conserve_sdk._desk.problems import bad_token, lease_unknown, refused
from conserve_sdk._desk.wire import lease_grant
from conserve_sdk.core import Broker
from conserve_sdk.core.decisions import Decision, Granted, LeaseAnswered, LeasesAnswered, Refused
from conserve_sdk.core.events import (
    Event,
    LeaseParked,
    LeaseReadopted,
    LeaseReleased,
    LeaseRenewed,
    LeasesRenewed,
    TurnFinished,
    TurnStarted,
)
from conserve_sdk.core.lease import Activity, Lease, LeaseKey
from conserve_sdk.core.receipt import Receipt
from conserve_sdk.core.units import LeaseId, Ms, RequestId, Tokens
from conserve_sdk.core.vocabulary import LeaseVerdict
from conserve_sdk.tokens import HeldToken, LeaseClaims, TokenError, TokenExpired, TokenSigner, claims_of

READOPTED_RULE = "readopted"
"""What the receipt of a re-adopted lease says: the placement's own numbers were lost with the broker's state."""

_LEDGER_DRIFT = 8
"""A token is renewed when its ledger is off by more than an eighth: it is what a re-adoption would restore."""

NewId = Callable[[str], str]
"""Makes an id for the kind of thing named (`"lease"`, `"request"`)."""

HolderEvent = LeaseRenewed | TurnStarted | TurnFinished | LeaseParked | LeaseReleased


class Visit:
    """Handlers of the routes work through this, and only through this.

    Attributes:
        core: read-only for handlers; `apply` is the way to change it.
    """

    def __init__(self, core: Broker, *, signer: TokenSigner, new_id: NewId, call: Call, preset: str) -> None:
        self.core = core
        self.call = call
        self.preset = preset
        self._signer = signer
        self._new_id = new_id
        self._events: list[Event] = []
        self._decisions: list[Decision] = []
        self._settled: dict[RequestId, Reply] = {}

    @property
    def now_ms(self) -> Ms:
        """The instant of this call."""
        return self.call.now_ms

    def apply(self, event: Event) -> list[Decision]:
        """Applies one event and keeps what it led to; answers to requests become replies at once."""
        decisions = self.core.apply(event)
        self._events.append(event)
        self._decisions.extend(decisions)
        for decision in decisions:
            if isinstance(decision, Granted):
                self._settled[decision.request_id] = self._granted(decision)
            elif isinstance(decision, Refused):
                self._settled[decision.request_id] = refused(decision)
        return decisions

    def new_lease_id(self) -> LeaseId:
        """An id for a lease that may be granted."""
        return LeaseId(self._new_id("lease"))

    def new_request_id(self) -> RequestId:
        """An id for a request that may have to wait."""
        return RequestId(self._new_id("request"))

    def settled(self, request_id: RequestId) -> Reply | RequestId:
        """The answer to this call's own request, or its id while it waits."""
        return self._settled.pop(request_id, request_id)

    def outcome(self, result: Reply | RequestId | None) -> Outcome:
        """Everything that came of the visit."""
        return Outcome(
            reply=result if isinstance(result, Reply) else None,
            waiting=None if isinstance(result, Reply) or result is None else result,
            settled=tuple(self._settled.items()),
            events=tuple(self._events),
            decisions=tuple(self._decisions),
        )

    def _granted(self, decision: Granted) -> Reply:
        lease = decision.lease
        grant = lease_grant(lease, token=self.token(lease), now_ms=self.now_ms, reused=decision.reused)
        return Reply(status=200 if decision.reused else 201, body=grant)

    # ---- tokens -------------------------------------------------------------------------------------------------

    def token(self, lease: Lease) -> str:
        """A new token for a live lease.

        It outlives the lease by one more TTL. `fresh_token` replaces it as soon as a renewal carries the lease past
        its end, so at every instant it ends no earlier than the lease that its holder keeps alive; and a lease that
        was not renewed for two TTLs can no longer be re-adopted by a broker that lost its state.
        """
        return self._signer.sign(claims_of(lease, exp_ms=Ms(lease.expires_at_ms + lease.ttl_ms)))

    def fresh_token(self, lease: Lease, held: LeaseClaims | HeldToken) -> str | None:
        """A new token when the held one ends too early or says too little of the lease as it is now, else None."""
        drift_tokens = abs(lease.ledger_tokens - held.ledger_tokens)
        lasts = held.exp_ms >= lease.expires_at_ms
        if lasts and held.migrations == lease.migrations and drift_tokens * _LEDGER_DRIFT <= lease.ledger_tokens:
            return None
        return self.token(lease)

    def claims(self, token: str, *, lease_id: str | None = None) -> LeaseClaims:
        """What a good token says.

        A token that is over still counts while this broker itself knows its lease to be alive (after an outage, every
        lease lives on by the grace, but nobody could hand out fresh tokens meanwhile).

        Args:
            token: as the client sent it.
            lease_id: the lease that the path names, which the token must name too.

        Raises:
            ProblemRaised: `bad_token`, or `lease_unknown` for a lease that ended with its token.
        """
        try:
            claims = self._signer.verify(token, now_ms=self.now_ms)
        except TokenExpired as over:
            claims = over.claims
            if self.core.lease(claims.lease_id) is None:
                raise lease_unknown(claims.lease_id) from over
        except TokenError as fault:
            raise bad_token(str(fault)) from fault
        if claims.tenant != self.call.tenant:
            raise bad_token("the token belongs to another tenant")
        if lease_id is not None and claims.lease_id != lease_id:
            raise bad_token(f"the token is for lease {claims.lease_id}, not for {lease_id[:64]}")
        return claims

    def live_lease_of(self, token: str) -> tuple[HeldToken, Lease] | None:
        """The live lease of a good token, as `claims` would find it but for less work; None: not that simple."""
        try:
            held = self._signer.recognise(token)
        except TokenError:
            return None
        lease = self.core.lease(held.lease_id)
        return None if lease is None or held.tenant != self.call.tenant else (held, lease)

    # ---- word from a holder -------------------------------------------------------------------------------------

    def tell(self, claims: LeaseClaims, event: HolderEvent) -> LeaseAnswered:
        """Applies word from a lease's holder; re-adopts the lease first when this broker does not know it."""
        if self.core.lease(claims.lease_id) is None:
            readopted = self.answer(claims.lease_id, LeaseReadopted(now_ms=self.now_ms, lease=self._lost_lease(claims)))
            if readopted.verdict is not LeaseVerdict.OK:
                if isinstance(event, TurnFinished):
                    self.apply(event)  # its transfer counts, even when it is heard of after the lease
                return readopted
        return self.answer(claims.lease_id, event)

    def answer(self, lease_id: LeaseId, event: HolderEvent | LeaseReadopted) -> LeaseAnswered:
        """Applies word of a lease that the core may or may not know, and finds what it says to it."""
        for decision in self.apply(event):
            if isinstance(decision, LeaseAnswered) and decision.lease_id == lease_id:
                return decision
        raise AssertionError(f"the core left {type(event).__name__} of {lease_id} unanswered")

    def renew(self, lease_ids: Sequence[LeaseId]) -> tuple[LeaseAnswered, ...]:
        """Applies the renewals of leases that this broker knows, in order."""
        for decision in self.apply(LeasesRenewed(now_ms=self.now_ms, lease_ids=tuple(lease_ids))):
            if isinstance(decision, LeasesAnswered):
                return decision.answers
        raise AssertionError("the core left renewals unanswered")

    def _lost_lease(self, claims: LeaseClaims) -> Lease:
        return Lease(
            lease_id=claims.lease_id,
            key=LeaseKey(
                tenant=claims.tenant,
                conversation_id=claims.conversation_id,
                lineage=claims.lineage,
                model=claims.model,
            ),
            epoch=claims.epoch,
            mode=claims.mode,
            prefiller=claims.prefiller,
            decoder=claims.decoder,
            granted_at_ms=claims.granted_at_ms,
            ttl_ms=claims.ttl_ms,
            expires_at_ms=min(claims.exp_ms, Ms(self.now_ms + claims.ttl_ms)),
            ledger_tokens=claims.ledger_tokens,
            hold_ms=claims.hold_ms,
            append_threshold_tokens=claims.append_threshold_tokens,
            supersedes=None,
            receipt=Receipt(
                preset=self.preset,
                rule=READOPTED_RULE,
                prefill_rule=READOPTED_RULE,
                need_tokens=Tokens(claims.ledger_tokens),
                waited_ms=0,
                candidates=(),
            ),
            # Nothing says whether a turn is running; the next report will, and until then the scrape counts it.
            activity=Activity.IDLE,
            activity_since_ms=self.now_ms,
            turns=claims.turns,
            migrations=claims.migrations,
        )

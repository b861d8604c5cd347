"""What comes out of `Broker.apply`: what the shell has to answer and to write.

The shell adds HTTP, signatures, a journal and a clock, no rules.
"""

from __future__ import annotations

from dataclasses import dataclass

from conserve_sdk.core._quick import quick_init
from conserve_sdk.core.lease import Lease
from conserve_sdk.core.receipt import Receipt
from conserve_sdk.core.units import EngineId, Incarnation, LeaseId, Ms, RequestId
from conserve_sdk.core.vocabulary import Directive, DropReason, EngineState, LeaseVerdict, MoveReason, RefusalReason


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """Answer to a `LeaseRequested` or `SupersedeRequested`. `reused`: the lease was already live."""

    request_id: RequestId
    lease: Lease
    reused: bool


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Answer to a request that cannot be admitted now. `retry_after_ms` 0: trying again will not help."""

    request_id: RequestId
    reason: RefusalReason
    detail: str
    retry_after_ms: Ms
    receipt: Receipt


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """The request is queued; `Granted` or `Refused` with its id follows from a later event."""

    request_id: RequestId
    position: int


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseAnswered:
    """Answer to a renewal, report, park, release or re-adoption. `lease` is None unless the verdict is OK.

    `successor` names the live lease of the same key when the verdict is `SUPERSEDED`. `directive` stands until a later
    answer says `NONE`.
    """

    lease_id: LeaseId
    verdict: LeaseVerdict
    lease: Lease | None = None
    successor: LeaseId | None = None
    directive: Directive = Directive.NONE
    move_reason: MoveReason | None = None


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LeasesAnswered:
    """Answers to a `LeasesRenewed`, in its order."""

    answers: tuple[LeaseAnswered, ...]


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseStored:
    """The shell must make this row durable before it answers. Not sent for mere renewals (grace covers them).

    Attributes:
        fresh: it was never stored: its receipt, which never changes, is to be written, too.
    """

    lease: Lease
    fresh: bool = False


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseDropped:
    """The shell must delete this row."""

    lease: Lease
    reason: DropReason


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStateChanged:
    """For logs, metrics and the journal of drain flags."""

    engine_id: EngineId
    before: EngineState
    after: EngineState
    incarnation: Incarnation | None
    detail: str


Decision = (
    Granted | Refused | Waiting | LeaseAnswered | LeasesAnswered | LeaseStored | LeaseDropped | EngineStateChanged
)

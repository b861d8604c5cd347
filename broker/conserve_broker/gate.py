"""Who asks, and may they: API keys, scopes and rate limits, decided in one place for every route.

Two keys of a tenant may be good at once, and the table can be replaced while the broker runs; that is how keys are
rotated. Once keys were demanded they stay demanded for the life of the process: an emptied table refuses everybody.
"""

from __future__ import annotations

import hmac
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from conserve_broker._access_tables import AccessTable, ApiKeyTable
from conserve_broker.api_keys import digest_of, id_in
from conserve_broker.logbook import Log, logger
from conserve_broker.rate_limit import TokenBucket
from conserve_sdk._desk import ProblemRaised, Scope
from conserve_sdk.core.units import TenantId
from conserve_sdk.protocol import Problem

__all__ = ["OPEN", "Caller", "Gate"]

_NOBODY = "0" * 64
"""What a key without an entry is compared with, so that it takes the same time."""
_TELL_EVERY_S = 1.0
_Limits = tuple[float, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whoever sent a request.

    Attributes:
        tenant: whose leases it may ask for and touch.
        scopes: of its key.
        key_id: names the key in logs; "" without keys.
        every_tenant: whether it may look at other tenants' leases.
    """

    tenant: TenantId
    scopes: frozenset[Scope]
    key_id: str = ""
    every_tenant: bool = False

    def may(self, *scopes: Scope) -> bool:
        """Whether it has one of these scopes, or `admin`."""
        return "admin" in self.scopes or not self.scopes.isdisjoint(scopes)


OPEN = Caller(
    tenant=TenantId("default"),
    scopes=frozenset({"agent", "worker", "admin"}),
    every_tenant=True,
)
"""Everybody, at a broker without keys."""


class Gate:
    """Lets a request in, or raises the problem document that answers it. On the event loop only.

    Args:
        keys: of the configuration; empty: the broker is open.
        access: what holds for all of them; its own `keys` are not looked at.
        admitted: called with the key's id whenever a request is let in.
        denied: called with the problem's code whenever a request is turned away.
        clock_s: monotonic seconds, for rates.
        now: the time of day, for the ends of keys.
        log: where it is told, once a second at most.
    """

    def __init__(
        self,
        keys: Sequence[ApiKeyTable] = (),
        *,
        access: AccessTable | None = None,
        admitted: Callable[[str], None] | None = None,
        denied: Callable[[str], None] | None = None,
        clock_s: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        log: Log | None = None,
    ) -> None:
        self.closed = bool(keys)
        self._access = access or AccessTable()
        self._entries = {key.id: key for key in keys}
        self._buckets: dict[str, TokenBucket] = {}
        self._admitted = admitted or (lambda _: None)
        self._denied = denied or (lambda _: None)
        self._clock_s = clock_s
        self._now = now
        self._log = log or logger()
        self._told_s = -math.inf
        self._untold: Counter[str] = Counter()

    @property
    def guards_metrics(self) -> bool:
        """Whether `/metrics` wants a key of scope `admin`."""
        return self.closed and self._access.metrics == "admin"

    def shares_engine_keys(self, caller: Caller) -> bool:
        """Whether leases bring the engines' own API keys along for this caller."""
        return self.closed and self._access.share_engine_credentials == "agent" and caller.may("agent")

    def replace(self, keys: Sequence[ApiKeyTable], *, access: AccessTable) -> None:
        """Go on with these keys. A gate that was closed stays closed, even without any."""
        self.closed = self.closed or bool(keys)
        self._entries = {key.id: key for key in keys}
        self._access = access
        for key_id, bucket in list(self._buckets.items()):
            entry = self._entries.get(key_id)
            if entry is None or self._limits_of(entry) != (bucket.rate_per_s, bucket.burst):
                del self._buckets[key_id]

    def admit(self, headers: Mapping[str, str], *scopes: Scope) -> Caller:
        """Who sent these headers (a mapping that does not care for upper case).

        Args:
            headers: of the request.
            scopes: whose keys may ask, besides those of scope `admin`.

        Raises:
            ProblemRaised: 401 without a good key, 403 without the scope, 429 above the key's rate.
        """
        if not self.closed:
            return OPEN
        try:
            entry = self._entry(headers.get("authorization", ""))
            self._pace(entry)
            caller = Caller(
                tenant=TenantId(entry.tenant),
                scopes=frozenset(entry.scopes),
                key_id=entry.id,
                every_tenant="admin" in entry.scopes,
            )
            if not caller.may(*scopes):
                raise _scope_missing(entry, scopes)
        except ProblemRaised as raised:
            self._denied(raised.problem.code)
            self._tell(raised.problem)
            raise
        self._admitted(caller.key_id)
        return caller

    def _entry(self, authorization: str) -> ApiKeyTable:
        scheme, _, text = authorization.partition(" ")
        text = text.strip()
        if scheme.lower() != "bearer" or not text:
            raise _unknown("key_missing", "send an API key: `Authorization: Bearer <key>`", error="")
        entry = self._entries.get(id_in(text))
        known = _NOBODY if entry is None else entry.sha256
        if not hmac.compare_digest(digest_of(text), known) or entry is None:
            raise _unknown("key_unknown", "this API key is not known here; make one with `conserve broker keygen`")
        if entry.expires_at is not None and self._now() >= entry.expires_at:
            raise _unknown(
                "key_expired", f"the API key {entry.id} ended at {entry.expires_at.isoformat()}; get a new one"
            )
        return entry

    def _limits_of(self, entry: ApiKeyTable) -> _Limits:
        return (
            self._access.requests_per_s if entry.requests_per_s is None else entry.requests_per_s,
            self._access.burst if entry.burst is None else entry.burst,
        )

    def _pace(self, entry: ApiKeyTable) -> None:
        rate, burst = self._limits_of(entry)
        if not rate:
            return
        now_s = self._clock_s()
        bucket = self._buckets.get(entry.id)
        if bucket is None:
            bucket = self._buckets[entry.id] = TokenBucket(rate_per_s=rate, burst=burst, now_s=now_s)
        wait_s = bucket.take(now_s)
        if wait_s:
            raise _too_fast(entry, rate, retry_after_ms=math.ceil(wait_s * 1000))

    def _tell(self, problem: Problem) -> None:
        """Somebody should see it, but nobody may fill the log with it."""
        self._untold[problem.code] += 1
        now_s = self._clock_s()
        if now_s - self._told_s >= _TELL_EVERY_S:
            self._log.warning("access_denied", detail=problem.detail, counts=dict(self._untold))
            self._told_s = now_s
            self._untold.clear()


def _unknown(code: str, detail: str, *, error: str = "invalid_token") -> ProblemRaised:
    challenge = 'Bearer realm="conserve"' + (f', error="{error}"' if error else "")
    return ProblemRaised(Problem(title="No good API key", status=401, detail=detail, code=code), challenge=challenge)


def _scope_missing(entry: ApiKeyTable, scopes: Sequence[Scope]) -> ProblemRaised:
    wanted = " or ".join((*scopes, "admin"))
    return ProblemRaised(
        Problem(
            title="Not allowed with this API key",
            status=403,
            detail=f"the API key {entry.id} has scope {', '.join(entry.scopes)}; this needs {wanted}",
            code="scope_missing",
        ),
        challenge=f'Bearer realm="conserve", error="insufficient_scope", scope="{" ".join((*scopes, "admin"))}"',
    )


def _too_fast(entry: ApiKeyTable, rate: float, *, retry_after_ms: int) -> ProblemRaised:
    return ProblemRaised(
        Problem(
            title="Too many requests",
            status=429,
            detail=f"the API key {entry.id} sends more than {rate:g} requests per second; wait, or send batches",
            code="rate_limited",
            retry_after_ms=retry_after_ms,
        )
    )

"""What a shell hands to the desk and what it gets back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from conserve_sdk.core.decisions import Decision, LeaseDropped, LeaseStored
from conserve_sdk.core.events import Event
from conserve_sdk.core.units import Ms, RequestId, TenantId
from conserve_sdk.protocol import LEASE_HEADER, LEASE_SCHEME, PROBLEM_MEDIA_TYPE, Problem


def lease_token_in(headers: Mapping[str, str]) -> str:
    """The lease's token that a request's headers carry, or ""; the mapping must not care for upper case."""
    token = headers.get(LEASE_HEADER)
    if token is not None:
        return token
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    return rest if scheme == LEASE_SCHEME else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request of a client, as far as HTTP is concerned.

    Attributes:
        now_ms: the broker's clock (Unix epoch).
        tenant: who asks; the shell's authentication decides it.
        every_tenant: whether the caller may look at leases of other tenants, too.
        target: the lease or engine that the path names, or "".
        lease_token: see `lease_token_in`.
        raw: the body's bytes, or the query's (`query_as_body`).
    """

    now_ms: Ms
    tenant: TenantId = TenantId("default")
    every_tenant: bool = True
    target: str = ""
    lease_token: str = ""
    raw: bytes = b""


def query_as_body(parameters: Iterable[tuple[str, str]]) -> bytes:
    """A query in the form of a body, for routes that take one; of a name that is repeated the last one counts."""
    return json.dumps(dict(parameters)).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer on its way to a client; `body` None stands for an empty one.

    Attributes:
        challenge: `WWW-Authenticate` where it is not the lease's token that is missing.
    """

    status: int
    body: BaseModel | None = None
    challenge: str = ""

    @property
    def media_type(self) -> str:
        """`application/problem+json` for problems, else `application/json`."""
        return PROBLEM_MEDIA_TYPE if type(self.body) is Problem else "application/json"

    @property
    def headers(self) -> dict[str, str]:
        """Content type and, where trying again helps, `Retry-After` in whole seconds, rounded up (RFC 9110)."""
        headers: dict[str, str] = {}
        if self.body is not None:
            headers["content-type"] = self.media_type
        if type(self.body) is Problem and self.body.retry_after_ms:
            headers["retry-after"] = str(-(-self.body.retry_after_ms // 1000))
        if self.challenge or self.status == 401:
            headers["www-authenticate"] = self.challenge or "Lease"
        return headers

    def content(self) -> bytes:
        """The body as JSON bytes."""
        return b"" if self.body is None else self.body.model_dump_json().encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Everything one call or event led to. The shell makes `changes` durable first, then lets the answers go.

    Attributes:
        reply: the answer to the caller; None after `Desk.feed`, or while the request waits for admission.
        waiting: names the request that waits; a later outcome settles it.
        settled: answers to requests that had been waiting, in the order in which they were settled.
        events: what was applied to the core, in order.
        decisions: what the core said, in order.
    """

    reply: Reply | None
    waiting: RequestId | None
    settled: tuple[tuple[RequestId, Reply], ...]
    events: tuple[Event, ...]
    decisions: tuple[Decision, ...]

    @property
    def changes(self) -> tuple[LeaseStored | LeaseDropped, ...]:
        """The rows to write and to delete, in order."""
        return tuple(item for item in self.decisions if isinstance(item, LeaseStored | LeaseDropped))

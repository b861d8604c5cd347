"""The queue of requests that wait for admission: FIFO per tenant, round robin over tenants, one queue per model.

Only the head of a tenant's line may be admitted, so a large request is not starved by small ones of its own tenant; a
head that does not fit never holds up another tenant. The queue decides nothing: the broker tries the heads.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from conserve_sdk.core.lease import LeaseKey
from conserve_sdk.core.units import EngineId, LeaseId, ModelName, Ms, PrefixKey, RequestId, TenantId, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacing:
    """The lease that a supersede request wants to replace: it must still be live with this epoch (compare-and-set)."""

    lease_id: LeaseId
    epoch: int


@dataclass(slots=True, kw_only=True)
class Pending:
    """A request that was not answered yet.

    Attributes:
        exact: whether `input_tokens` is a count or an estimate from bytes.
        deadline_at_ms: first instant at which it no longer waits.
        parent: decoder of the lease that its lineage branched off.
        failover: whether it replaces a lease whose decoder failed.
    """

    request_id: RequestId
    lease_id: LeaseId
    key: LeaseKey
    input_tokens: Tokens
    exact: bool
    asked_at_ms: Ms
    deadline_at_ms: Ms
    hint: EngineId | None = None
    parent: EngineId | None = None
    prefix_key: PrefixKey = PrefixKey("")
    replacing: Replacing | None = None
    failed_engine_id: EngineId | None = None
    failover: bool = False


_Line = OrderedDict[RequestId, Pending]


class AdmissionQueue:
    """Pending requests in their order."""

    def __init__(self) -> None:
        self._pending: dict[RequestId, Pending] = {}
        self._lines: dict[ModelName, OrderedDict[TenantId, _Line]] = {}
        self._of_key: dict[LeaseKey, _Line] = {}
        self._deadlines: list[tuple[Ms, RequestId]] = []

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[Pending]:
        """Everybody who waits, in the order of arrival."""
        return iter(self._pending.values())

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._pending

    def ahead_of(self, key: LeaseKey) -> int:
        """How many stand before a newcomer of this tenant and model."""
        lines = self._lines.get(key.model)
        return 0 if lines is None else len(lines.get(key.tenant, ()))

    def waiting_for(self, model: ModelName) -> int:
        """How many wait for a model."""
        return sum(len(line) for line in self._lines.get(model, {}).values())

    def add(self, pending: Pending) -> None:
        """Append to the tenant's line."""
        assert pending.request_id not in self._pending, f"request {pending.request_id} already waits"
        self._pending[pending.request_id] = pending
        lines = self._lines.setdefault(pending.key.model, OrderedDict())
        line = lines.setdefault(pending.key.tenant, OrderedDict())
        line[pending.request_id] = pending
        self._of_key.setdefault(pending.key, OrderedDict())[pending.request_id] = pending
        heapq.heappush(self._deadlines, (pending.deadline_at_ms, pending.request_id))

    def remove(self, request_id: RequestId) -> Pending | None:
        """Take a request out, wherever it stands; None when it does not wait."""
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return None
        key = pending.key
        lines = self._lines[key.model]
        del lines[key.tenant][request_id]
        if not lines[key.tenant]:
            del lines[key.tenant]
        if not lines:
            del self._lines[key.model]
        del self._of_key[key][request_id]
        if not self._of_key[key]:
            del self._of_key[key]
        return pending

    def of_key(self, key: LeaseKey) -> tuple[Pending, ...]:
        """The requests that wait for one and the same lease."""
        return tuple(self._of_key.get(key, {}).values())

    def next_deadline_ms(self) -> Ms | None:
        """The first deadline of a waiting request."""
        while self._deadlines:
            deadline_at_ms, request_id = self._deadlines[0]
            pending = self._pending.get(request_id)
            if pending is not None and pending.deadline_at_ms == deadline_at_ms:
                return deadline_at_ms
            heapq.heappop(self._deadlines)
        return None

    def first_overdue(self, now_ms: Ms) -> Pending | None:
        """The waiting request whose deadline passed first, at or before `now_ms`; ties by id."""
        deadline_at_ms = self.next_deadline_ms()
        return None if deadline_at_ms is None or now_ms < deadline_at_ms else self._pending[self._deadlines[0][1]]

    def serve(self, answered: Callable[[Pending], bool]) -> None:
        """Offer the heads, round robin over tenants, until none can be answered.

        Args:
            answered: tries to answer a head; returns whether it did, after which the request has left the queue.
        """
        for model in tuple(self._lines):
            turn = tuple(self._lines.get(model, ()))
            while turn:
                turn = tuple(tenant for tenant in turn if self._serve_head(model, tenant, answered))

    def _serve_head(self, model: ModelName, tenant: TenantId, answered: Callable[[Pending], bool]) -> bool:
        lines = self._lines.get(model, OrderedDict())
        if tenant not in lines or not answered(next(iter(lines[tenant].values()))):
            return False
        if tenant in lines:
            lines.move_to_end(tenant)
        return True

"""What HTTP talks to: the service while this broker decides, and the way to the leader while it stands by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from conserve_broker.service import BrokerService, Readiness, Waiter
from conserve_sdk._desk import Reply, Route
from conserve_sdk.core.units import TenantId
from conserve_sdk.protocol import Problem

__all__ = ["Front", "Leadership", "not_leader"]


class Leadership(Protocol):
    """Whether this broker leads; see `conserve_broker.replica.Replica`."""

    def leads(self) -> bool:
        """Whether the lock is surely ours at this instant."""

    @property
    def follows(self) -> bool:
        """Whether this broker knows the leases, so that it could lead at once."""

    @property
    def leader_url(self) -> str:
        """Where the leader answers; empty when unknown."""

    @property
    def failure(self) -> str:
        """What keeps the store from being used; empty when it is in order."""

    @property
    def retry_after_ms(self) -> int:
        """When it is worth asking again."""


class Front:
    """Serves requests with whatever service there is.

    Attributes:
        service: decides; None while another broker does, and before the start.

    Args:
        leadership: None for a broker that is alone.
        warnings: what somebody should look at, for `/readyz`.
    """

    def __init__(
        self, *, leadership: Leadership | None = None, warnings: Callable[[], tuple[str, ...]] = tuple
    ) -> None:
        self.service: BrokerService | None = None
        self._leadership = leadership
        self._warnings = warnings

    async def handle(
        self,
        route: Route[Any],
        *,
        tenant: TenantId,
        every_tenant: bool = True,
        target: str = "",
        lease_token: str = "",
        raw: bytes = b"",
    ) -> Reply | Waiter:
        """Serve one request; see `BrokerService.handle`.

        A broker that stopped leading answers nothing of what it knows: neither a request that came too late, nor one
        whose changes the store refused meanwhile.
        """
        service = self.service
        if service is None or not self._leads():
            return self._not_leader()
        answer = await service.handle(
            route, tenant=tenant, every_tenant=every_tenant, target=target, lease_token=lease_token, raw=raw
        )
        if isinstance(answer, Waiter) or self._leads():
            return answer
        return self._not_leader()

    def readiness(self) -> Readiness:
        """Whether new conversations can be served here, and why not."""
        service, leadership = self.service, self._leadership
        warnings = self._warnings()
        if service is not None and self._leads():
            state = service.readiness()
            role = "alone" if leadership is None else "leader"
            return Readiness(reasons=state.reasons, warnings=state.warnings + warnings, role=role)
        if leadership is None:
            return Readiness(reasons=("the broker is starting",), warnings=warnings)
        if leadership.failure:
            reason = f"standby, and no broker can lead: {leadership.failure}"
        elif not leadership.follows:
            reason = "standby: is reading the leases and cannot lead yet"
        elif leadership.leader_url:
            reason = f"standby: {leadership.leader_url} leads"
        else:
            reason = "standby: a leader is being found, or does not say where it answers"
        can_lead = leadership.follows and not leadership.failure
        return Readiness(reasons=(reason,), warnings=warnings, role="standby", can_lead=can_lead)

    @property
    def leader_url(self) -> str:
        """Where the leader answers while this broker stands by; empty when it does not, or nobody knows."""
        return "" if self._leadership is None or self._leads() else self._leadership.leader_url

    def _leads(self) -> bool:
        return self._leadership is None or self._leadership.leads()

    def _not_leader(self) -> Reply:
        leadership = self._leadership
        if leadership is None:
            return not_leader("", why="the broker is starting", retry_after_ms=1_000)
        return not_leader(leadership.leader_url, why=leadership.failure, retry_after_ms=leadership.retry_after_ms)


def not_leader(leader_url: str, *, why: str, retry_after_ms: int) -> Reply:
    """503: this broker stands by; another one answers."""
    if leader_url:
        detail = f"this broker stands by; ask the leader at {leader_url}"
    else:
        detail = "this broker stands by and knows of no leader; try another broker, or this one again in a moment"
    problem = Problem(
        title="Not the leader",
        status=503,
        detail=f"{detail} ({why})" if why else detail,
        code="not_leader",
        retry_after_ms=retry_after_ms,
        leader_url=leader_url or None,
    )
    return Reply(status=503, body=problem)

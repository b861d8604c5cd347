"""The KV occupancy ledger: what the live leases hold on each decoder, kept as running sums.

Invariant 3: an account equals the sum over the live leases of that decoder, is never negative and is 0 when all are
gone. Nothing here looks at engines: a lease may sit on an engine that is not (or no longer) configured.
"""

from __future__ import annotations

from dataclasses import dataclass

from conserve_sdk.core.lease import Activity, Lease
from conserve_sdk.core.units import EngineId, TenantId, Tokens


@dataclass(slots=True)
class Account:
    """Sums over the live leases of one decoder.

    Attributes:
        leased_tokens: their ledgers.
        cold_tokens: ledgers of those that are parked or idle for long (see `conserve_sdk.core.idleness`).
        holding_tokens: ledgers of those with a `hold_ms` that are not parked (KV is never held for a human).
        leases: how many they are.
        busy: how many are in a turn.
    """

    leased_tokens: int = 0
    cold_tokens: int = 0
    holding_tokens: int = 0
    leases: int = 0
    busy: int = 0

    def _count(self, lease: Lease, *, sign: int) -> None:
        self.leases += sign
        self.leased_tokens += sign * lease.ledger_tokens
        if lease.hold_ms and lease.activity is not Activity.PARKED:
            self.holding_tokens += sign * lease.ledger_tokens
        if lease.activity is Activity.BUSY:
            self.busy += sign


class Occupancy:
    """Accounts by decoder."""

    def __init__(self) -> None:
        self._accounts: dict[EngineId, Account] = {}
        self._of_tenant: dict[TenantId, int] = {}

    def account(self, engine_id: EngineId) -> Account:
        """The decoder's account; an empty one where it has no leases."""
        return self._accounts.get(engine_id) or Account()

    def held_by(self, tenant: TenantId) -> Tokens:
        """Tokens that all live leases of a tenant hold."""
        return Tokens(self._of_tenant.get(tenant, 0))

    def add(self, lease: Lease) -> None:
        """Count a lease that went live."""
        self._accounts.setdefault(lease.decoder.engine_id, Account())._count(lease, sign=1)  # noqa: SLF001
        self._of_tenant[lease.key.tenant] = self.held_by(lease.key.tenant) + lease.ledger_tokens

    def cool(self, lease: Lease, *, sign: int) -> None:
        """A counted lease became cold (`sign` 1), or no longer is (-1)."""
        account = self._accounts[lease.decoder.engine_id]
        account.cold_tokens += sign * lease.ledger_tokens
        assert 0 <= account.cold_tokens <= account.leased_tokens, f"cold ledger on {lease.decoder.engine_id}: {account}"

    def remove(self, lease: Lease) -> None:
        """Stop counting a lease, in exactly the form in which it was added; it is not cold any more."""
        left = self._of_tenant.pop(lease.key.tenant, 0) - lease.ledger_tokens
        if left:
            self._of_tenant[lease.key.tenant] = left
        engine_id = lease.decoder.engine_id
        account = self._accounts[engine_id]
        account._count(lease, sign=-1)  # noqa: SLF001
        assert min(account.leased_tokens, account.holding_tokens, account.busy) >= 0, f"negative ledger on {engine_id}"
        if account.leases == 0:
            assert account == Account(), f"ledger of {engine_id} keeps {account} without leases"
            del self._accounts[engine_id]

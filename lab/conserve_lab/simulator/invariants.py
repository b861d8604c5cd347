"""The broker's invariants (numbers as in docs/architecture.md), looked at while a simulation runs."""

from __future__ import annotations

from conserve_sdk.core import Broker
from conserve_sdk.core.decisions import Granted, LeaseDropped
from conserve_sdk.core.events import TurnFinished
from conserve_sdk.core.lease import Lease, Mode
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import LeaseId, Ms
from conserve_sdk.core.vocabulary import DropReason, EngineState


class Invariants:
    """Asserts what must always hold of a broker.

    Not looked at here: what only a restart of the broker can break, which its own tests do.

    Args:
        core: the broker.
        settings: its bounds.
    """

    def __init__(self, core: Broker, settings: BrokerSettings) -> None:
        self._core = core
        self._settings = settings
        self._engines_of: dict[LeaseId, tuple[object, object, Mode]] = {}
        self._moved: set[LeaseId] = set()

    def granted(self, answer: Granted) -> None:
        """A lease was handed out: its engines are ready, of the incarnation it names, and stay what they are."""
        lease = answer.lease
        self._same_engines(lease)
        if answer.reused:
            return
        views = {view.engine_id: view for view in self._core.engines()}
        decoder = views[lease.decoder.engine_id]
        assert decoder.state is EngineState.READY, f"lease {lease.lease_id} on an engine that is {decoder.state}"
        assert decoder.incarnation == lease.decoder.incarnation, f"lease {lease.lease_id} on an engine that is no more"

    def dropped(self, decision: LeaseDropped, *, now_ms: Ms) -> None:
        """A lease ended: never before its time."""
        lease = decision.lease
        if decision.reason is DropReason.EXPIRED:
            assert now_ms >= lease.expires_at_ms, f"lease {lease.lease_id} expired before its TTL"
        self._engines_of.pop(lease.lease_id, None)
        self._moved.discard(lease.lease_id)

    def reported(self, report: TurnFinished) -> None:
        """A client says that a turn ended: one lease moves its KV once."""
        if report.migrated:
            assert report.lease_id not in self._moved, f"lease {report.lease_id} moved its KV twice"
            self._moved.add(report.lease_id)

    def check(self) -> None:
        """Everything that can be seen between two events."""
        sums: dict[str, int] = {}
        keys = set()
        for lease in self._core.leases():
            self._same_engines(lease)
            keys.add(lease.key)
            assert 0 <= lease.migrations <= 1, f"lease {lease.lease_id} migrated {lease.migrations} times"
            assert lease.ledger_tokens >= 0
            sums[lease.decoder.engine_id] = sums.get(lease.decoder.engine_id, 0) + lease.ledger_tokens
        assert len(keys) == self._core.lease_count(), "two live leases of one key"
        for view in self._core.engines():
            assert view.kv_leased_tokens == sums.get(view.engine_id, 0), f"ledger of {view.engine_id} is wrong"
            assert 0 <= view.kv_active_tokens <= view.kv_leased_tokens
        assert self._core.lease_count() <= self._settings.leases_max
        assert self._core.waiting() <= self._settings.queue_max

    def _same_engines(self, lease: Lease) -> None:
        seen = (lease.prefiller, lease.decoder, lease.mode)
        assert self._engines_of.setdefault(lease.lease_id, seen) == seen, f"lease {lease.lease_id} changed its engines"

"""The broker: one state machine that every shell runs (service, tests, simulator)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from conserve_sdk.core import _engines, _granting, _reporting, events
from conserve_sdk.core._state import State
from conserve_sdk.core.advice import Advice, advise
from conserve_sdk.core.decisions import Decision
from conserve_sdk.core.events import Event
from conserve_sdk.core.figures import GrantFigures
from conserve_sdk.core.lease import Activity, Lease, LeaseKey
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import EngineId, LeaseId, ModelName, Ms, Ppm
from conserve_sdk.core.views import BrokerCounters, EngineView, WaitingRequest

_HANDLERS: dict[type[Any], Callable[[State, Any], None]] = {
    events.EngineConfigured: _engines.configure,
    events.EngineRemoved: _engines.remove,
    events.EngineObserved: _engines.observe,
    events.EngineUnreachable: _engines.unreachable,
    events.EngineRestarted: _engines.restarted,
    events.EngineDrained: _engines.drain,
    events.EngineFailureReported: _engines.report_failure,
    events.LeaseRequested: _granting.request_lease,
    events.SupersedeRequested: _granting.supersede,
    events.RequestCancelled: _granting.cancel,
    events.LeaseRenewed: _reporting.renew,
    events.LeasesRenewed: _reporting.renew_all,
    events.TurnStarted: _reporting.turn_started,
    events.TurnFinished: _reporting.turn_finished,
    events.LeaseParked: _reporting.park,
    events.LeaseReleased: _reporting.release,
    events.LeaseReadopted: _reporting.readopt,
    events.JournalFollowed: _reporting.follow,
    events.Recovered: _reporting.recover,
    events.TimerFired: lambda _state, _event: None,
}


class Broker:
    """Decides leases. Reads no clock, draws no random number, performs no I/O.

    The shell feeds events in the order in which they happened, carries out the decisions in the order in which they
    come (rows durable before answers leave), and sends a `TimerFired` when `next_deadline_ms()` has come. The same
    events give the same decisions, always.
    """

    def __init__(self, settings: BrokerSettings | None = None) -> None:
        self._state = State(settings or BrokerSettings())

    def apply(self, event: Event) -> list[Decision]:
        """Take one event and return what follows from it.

        What became due by ``event.now_ms`` happens first, so a renewal at the instant of expiry finds a dead lease.

        Raises:
            AssertionError: the clock went backwards, or an id was used twice: errors of the shell.
        """
        state = self._state
        assert event.now_ms >= state.now_ms, f"time went backwards: {event.now_ms} after {state.now_ms}"
        later = event.now_ms > state.now_ms
        state.now_ms = event.now_ms
        decisions: list[Decision] = []
        state.out = decisions
        self._advance(time_passed=later)
        _HANDLERS[type(event)](state, event)
        _granting.admit_waiting(state)
        return decisions

    def next_deadline_ms(self) -> Ms | None:
        """The next instant at which something happens by itself; always later than the last event."""
        state = self._state
        deadlines = (
            state.leases.next_expiry_ms(),
            state.fleet.next_deadline_ms(),
            state.queue.next_deadline_ms(),
            state.next_cooling_ms(),
        )
        return min((at_ms for at_ms in deadlines if at_ms is not None), default=None)

    # ---- reading ----

    @property
    def settings(self) -> BrokerSettings:
        """What it was built with."""
        return self._state.settings

    @property
    def now_ms(self) -> Ms:
        """The instant of the last event."""
        return self._state.now_ms

    def lease(self, lease_id: LeaseId) -> Lease | None:
        """The live lease of this id."""
        return self._state.leases.get(lease_id)

    def live_lease_of(self, key: LeaseKey) -> Lease | None:
        """The live lease of this key."""
        return self._state.leases.live_of(key)

    def leases(self) -> Iterator[Lease]:
        """All live leases, in the order in which they went live; not to be kept over an `apply`."""
        return iter(self._state.leases)

    def lease_engines(self) -> tuple[EngineId, ...]:
        """The engines that live leases name as decoder, configured or not, ordered."""
        return self._state.leases.decoders()

    def lease_count(self) -> int:
        """How many leases live."""
        return len(self._state.leases)

    def leases_from(self, place: int) -> Iterator[Lease]:
        """Live leases from a place of that order on (0: the first); not to be kept over an `apply`."""
        return islice(iter(self._state.leases), place, None)

    def leases_ended(self) -> int:
        """How many leases have ended: by so much at most, a lease's place has moved since this was read before."""
        return self._state.leases.removals

    def activities(self) -> dict[Activity, int]:
        """How many live leases are in each activity."""
        return dict(self._state.activities)

    def engines(self) -> tuple[EngineView, ...]:
        """The configured engines, ordered by id."""
        return self._state.fleet.views()

    def waiting(self) -> int:
        """How many requests wait for admission."""
        return len(self._state.queue)

    def waiting_requests(self, *, most: int) -> tuple[WaitingRequest, ...]:
        """Those who wait for admission, in the order of arrival, the first `most` of them."""
        return tuple(
            WaitingRequest(
                request_id=pending.request_id,
                key=pending.key,
                need_tokens=pending.input_tokens,
                asked_at_ms=pending.asked_at_ms,
                deadline_at_ms=pending.deadline_at_ms,
            )
            for pending in islice(self._state.queue, most)
        )

    @property
    def counters(self) -> BrokerCounters:
        """A copy of the totals since the start."""
        counters = self._state.counters
        return replace(
            counters,
            refused=dict(counters.refused),
            decoder_rules=dict(counters.decoder_rules),
            prefill_rules=dict(counters.prefill_rules),
            directives=dict(counters.directives),
            moved=dict(counters.moved),
            stayed=dict(counters.stayed),
        )

    def grant_figures(self, model: ModelName) -> GrantFigures:
        """Waits and first turns of the model's last grants."""
        return self._state.figures.of(model)

    def advice(self) -> tuple[Advice, ...]:
        """What the figures of each configured model call for, ordered by its name."""
        state = self._state
        return tuple(
            advise(
                model,
                state.fleet.views_of_model(model),
                grants=state.figures.of(model),
                waiting=state.queue.waiting_for(model),
                placement=state.settings.placement,
            )
            for model in sorted({view.spec.model for view in state.fleet.views()})
        )

    def tokens_per_byte_ppm(self, model: ModelName) -> Ppm:
        """The ratio that turns prompt bytes into tokens for a model, as observed so far."""
        return self._state.ratios.ppm(model)

    # ---- inside ----

    def _advance(self, *, time_passed: bool) -> None:
        state = self._state
        _reporting.expire_due(state)
        if time_passed:  # the reports of one batch have one instant
            state.tombstones.prune(state.now_ms)
            state.cool()
            _engines.advance(state)
        _granting.admit_waiting(state)
        _granting.refuse_overdue(state)

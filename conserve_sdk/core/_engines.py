"""What happens to engines, and to the leases on them."""

from __future__ import annotations

from conserve_sdk.core._state import State
from conserve_sdk.core.decisions import EngineStateChanged
from conserve_sdk.core.events import (
    EngineConfigured,
    EngineDrained,
    EngineFailureReported,
    EngineObserved,
    EngineRemoved,
    EngineRestarted,
    EngineUnreachable,
)
from conserve_sdk.core.units import EngineId, Incarnation
from conserve_sdk.core.vocabulary import DropReason, EngineState


def configure(state: State, event: EngineConfigured) -> None:
    """Add or change an engine; an engine that was drained stays so."""
    state.tell(state.fleet.configure(event.spec, draining=event.draining, now_ms=event.now_ms))
    state.room_may_have_appeared = True


def remove(state: State, event: EngineRemoved) -> None:
    """Forget an engine; also drops leases of an engine that was never configured here (recovered ones)."""
    changed = state.fleet.remove(event.engine_id)
    state.drop_all_on(event.engine_id, DropReason.ENGINE_REMOVED)
    state.tell(changed)
    # Whoever waits for a model that nobody serves any more hears it now.
    state.room_may_have_appeared = True


def drain(state: State, event: EngineDrained) -> None:
    """Stop or resume giving leases to an engine."""
    state.tell(state.fleet.drain(event.engine_id, draining=event.draining, now_ms=event.now_ms))
    state.room_may_have_appeared = True


def observe(state: State, event: EngineObserved) -> None:
    """Take a scrape. Leases granted on another incarnation have lost their KV."""
    before = state.fleet.view(event.engine_id)
    if before is None:
        return
    changed, another = state.fleet.observe(event)
    if another:
        if before.incarnation is not None:
            state.counters.engine_restarts += 1
        _drop_other_incarnations(state, event.engine_id, event.incarnation)
    state.tell(changed)
    state.room_may_have_appeared = True


def restarted(state: State, event: EngineRestarted) -> None:
    """Take an engine's own word, which comes sooner than the scrape that shows the same."""
    changed = state.fleet.restart(event)
    if changed is not None:
        state.counters.engine_restarts += 1
        _drop_other_incarnations(state, event.engine_id, event.incarnation)
        state.tell(changed)


def unreachable(state: State, event: EngineUnreachable) -> None:
    """Take a failed scrape."""
    _follow(state, state.fleet.fail(event))


def report_failure(state: State, event: EngineFailureReported) -> None:
    """Take a client's word that an engine failed."""
    state.tell(state.fleet.report_failure(event))


def advance(state: State) -> None:
    """Time passed: failing engines become suspect, then gone."""
    for changed in state.fleet.advance(state.now_ms):
        _follow(state, changed)


def _follow(state: State, changed: EngineStateChanged | None) -> None:
    if changed is not None and changed.after is EngineState.GONE:
        state.drop_all_on(changed.engine_id, DropReason.ENGINE_GONE)
    state.tell(changed)


def _drop_other_incarnations(state: State, engine_id: EngineId, incarnation: Incarnation) -> None:
    for lease in state.leases.of_decoder(engine_id, but_of=incarnation):
        state.drop(lease, DropReason.ENGINE_RESTARTED)

"""Moves of live leases: a re-lease in a gap, and an append that a prefiller takes. Each makes another lease.

A lease should move when its decoder drains, or, idle in a gap, when the decoder's load is more than MOVE above that of
another one that has room for it and that KV can reach (on a prefiller that hosts also when its prefill share is above
GATE). Nothing moves back and forth: the move must leave the target less loaded than the source is now, a directive
stands until the gap has fallen to half of MOVE, and a lease younger than `move_rest_ms` stays.

The holder is told in the answer to a report or renewal and carries it out before its next turn; then everything is
judged again, so that of many leases that were told to move only as many do as it takes to even the loads out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conserve_sdk.core._state import State
from conserve_sdk.core.admission import Pending
from conserve_sdk.core.hosting import Host, gap_exceeds, host_of, hosts_of, judge, lowest_load
from conserve_sdk.core.lease import Activity, Lease
from conserve_sdk.core.placement import Placement
from conserve_sdk.core.prefill import PrefillPlan, plan_prefill
from conserve_sdk.core.receipts import receipt_of
from conserve_sdk.core.units import EngineId, Ppm, Tokens
from conserve_sdk.core.views import EngineView
from conserve_sdk.core.vocabulary import EngineState, MoveReason, Role


@dataclass(slots=True)
class _Move:
    """Where a lease should go, and why."""

    reason: MoveReason
    source: EngineView
    target: Host
    hosts: Sequence[Host]


def directive(state: State, lease: Lease) -> MoveReason | None:
    """What the holder of a live lease is told now; counted when it changes."""
    before = state.directives.get(lease.lease_id)
    if before is None and _stays(state, lease):
        return None
    move = _move_of(state, lease, lease.ledger_tokens, failed_engine_id=None)
    if move is None:
        if before is not None:
            del state.directives[lease.lease_id]
            state.counters.withdrawn += 1
        return None
    if before is None:
        state.counters.directives[move.reason] += 1
    state.directives[lease.lease_id] = move.reason
    return move.reason


def re_lease(state: State, lease: Lease, pending: Pending, *, cached_tokens: Tokens) -> Placement | None:
    """Carry a directive out; None when the move is not worth it any more.

    The KV moves once, from the old decoder, which computes the new tokens on top of the history it holds. Where it
    cannot move, or the old decoder lost it, the new decoder prefills the whole prompt.
    """
    need = Tokens(pending.input_tokens + state.settings.placement.reserve_tokens)
    move = _move_of(state, lease, need, failed_engine_id=pending.failed_engine_id)
    if move is None or (move.reason is MoveReason.LOAD and not _in_a_gap(state, lease)):
        return None
    move.target.verdict = "chosen"
    moves = cached_tokens > 0 and _kv_moves(state, move.source, move.target.view)
    uncached = Tokens(max(pending.input_tokens - (cached_tokens if moves else 0), 0))
    plan = PrefillPlan(
        prefiller=move.source if moves else None,
        rule="old_decoder" if moves else "cannot_move",
        uncached_tokens=uncached,
    )
    state.counters.moved[move.reason] += 1
    rule = f"re_lease_{move.reason.value}"
    return _placement(state, pending, move.target, plan, rule=rule, hosts=move.hosts)


def append(state: State, lease: Lease, pending: Pending, *, cached_tokens: Tokens) -> Placement | None:
    """Where an append is prefilled; None when the decoder does it at least as fast, on top of what it holds.

    A prefiller computes the whole prompt, but for a preamble that it holds; only the blocks that the decoder lacks
    move.
    """
    settings = state.settings
    decoder = state.fleet.view(lease.decoder.engine_id)
    if not settings.placement.move_appends or decoder is None or decoder.state is not EngineState.READY:
        return None  # a lease on an engine that drains is moved by its directive
    if not decoder.observed_within(settings.observation_max_age_ms, now_ms=state.now_ms):
        return None
    engines = state.fleet.views_of_model(lease.key.model)
    cached = state.prefixes.cached_by(lease.lease_id, engines)
    cached[decoder.engine_id] = Tokens(min(cached_tokens, pending.input_tokens))
    plan = plan_prefill(
        decoder,
        engines,
        input_tokens=pending.input_tokens,
        cached=cached,
        failed_engine_id=pending.failed_engine_id,
        settings=settings,
        now_ms=state.now_ms,
    )
    if plan.prefiller is None:
        return None
    host = host_of(decoder, settings.placement)
    host.verdict = "chosen"
    return _placement(state, pending, host, plan, rule="append", hosts=[host])


def _placement(
    state: State, pending: Pending, host: Host, plan: PrefillPlan, *, rule: str, hosts: Sequence[Host]
) -> Placement:
    need = Tokens(pending.input_tokens + state.settings.placement.reserve_tokens)
    return Placement(
        decoder=host.view,
        prefiller=plan.prefiller,
        input_tokens=pending.input_tokens,
        uncached_tokens=plan.uncached_tokens,
        need_tokens=need,
        receipt=receipt_of(state.settings, rule=rule, need_tokens=need, waited_ms=0, hosts=hosts, plan=plan),
    )


# ---- whether to move --------------------------------------------------------------------------------------------


def _move_of(state: State, lease: Lease, need: int, *, failed_engine_id: EngineId | None) -> _Move | None:
    source = state.fleet.view(lease.decoder.engine_id)
    if not state.settings.placement.re_lease or source is None or lease.activity is Activity.PARKED:
        return None
    if source.state is EngineState.DRAINING:
        return _move_away(state, source, lease, need, failed_engine_id)
    if source.state is EngineState.READY and source.kv_capacity_tokens:
        return _move_for_load(state, source, lease, need, failed_engine_id)
    return None


def _stays(state: State, lease: Lease) -> bool:
    """Whether a lease that was told nothing yet need not be told to move: the usual case, known from little.

    The engine's view, which every report outdates, is made only for leases that load could move.
    """
    if not state.settings.placement.re_lease:
        return True
    engine_state = state.fleet.state_of(lease.decoder.engine_id)
    if engine_state is not EngineState.READY:
        return engine_state is not EngineState.DRAINING
    if _threshold_ppm(state, lease) is None:
        return True
    source = state.fleet.view(lease.decoder.engine_id)
    return source is not None and host_of(source, state.settings.placement).level


def _move_away(
    state: State, source: EngineView, lease: Lease, need: int, failed_engine_id: EngineId | None
) -> _Move | None:
    hosts = _others(state, source, lease, need, failed_engine_id)
    fitting = [host for host in hosts if host.verdict == "fits"]
    reachable = [host for host in fitting if _kv_moves(state, source, host.view)]
    if not fitting:
        return None
    return _Move(MoveReason.DRAINING, source, lowest_load(reachable or fitting, need_tokens=need), hosts)


def _move_for_load(
    state: State, source: EngineView, lease: Lease, need: int, failed_engine_id: EngineId | None
) -> _Move | None:
    rules = state.settings.placement
    threshold_ppm = _threshold_ppm(state, lease)
    if threshold_ppm is None:
        return None
    own = host_of(source, rules)
    if not own.gated and own.load(0) <= threshold_ppm * source.kv_capacity_tokens:
        return None  # no load is below 0, so no gap is that wide: the usual case, told without looking at the others
    hosts = _others(state, source, lease, need, failed_engine_id)
    fitting = [host for host in hosts if host.verdict == "fits" and _kv_moves(state, source, host.view)]
    if not fitting:
        return None
    best = lowest_load(fitting, need_tokens=0)
    improves = best.load(need) * source.kv_capacity_tokens < own.load(0) * best.view.kv_capacity_tokens
    if own.gated or (improves and gap_exceeds(own, best, than_ppm=threshold_ppm)):
        return _Move(MoveReason.LOAD, source, best, hosts)
    return None


def _threshold_ppm(state: State, lease: Lease) -> Ppm | None:
    """The gap of loads that would move this lease; None when it does not move because of load."""
    rules = state.settings.placement
    if lease.lease_id in state.directives:
        return rules.move_release_ppm
    rested = state.now_ms - lease.granted_at_ms >= rules.move_rest_ms
    return rules.move_threshold_ppm if lease.activity is Activity.IDLE and rested else None


def _in_a_gap(state: State, lease: Lease) -> bool:
    idle_ms = state.now_ms - lease.activity_since_ms
    return lease.activity is Activity.IDLE and idle_ms > state.settings.placement.move_idle_ms


def _others(state: State, source: EngineView, lease: Lease, need: int, failed_engine_id: EngineId | None) -> list[Host]:
    engines = [view for view in state.fleet.views_of_model(lease.key.model) if view is not source]
    hosts = hosts_of(engines, rules=state.settings.placement)
    judge(hosts, need_tokens=need, failed_engine_id=failed_engine_id, settings=state.settings, now_ms=state.now_ms)
    return hosts


def _kv_moves(state: State, source: EngineView, target: EngineView) -> bool:
    """Whether KV can move from one engine to another: one transfer group, one block size, and the source answers."""
    group = source.spec.transfer_group
    fresh = source.observed_within(state.settings.observation_max_age_ms, now_ms=state.now_ms)
    same = group == target.spec.transfer_group and source.block_size_tokens == target.block_size_tokens
    return bool(group) and same and fresh and target.spec.role is not Role.PREFILLER

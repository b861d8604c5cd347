"""Requests for leases: grant, re-grant, supersede, wait, refuse.

One request is answered exactly once, by `Granted` or `Refused`; `Waiting` only announces that the answer comes later.
A waiting request is answered as soon as it fits and is its tenant's first in line, and refused at its deadline, where
it gets a last look.
"""

from __future__ import annotations

from conserve_sdk.core._moving import append, re_lease
from conserve_sdk.core._state import State
from conserve_sdk.core.admission import Pending, Replacing
from conserve_sdk.core.decisions import Granted, Refused, Waiting
from conserve_sdk.core.events import LeaseRequested, RequestCancelled, SupersedeRequested
from conserve_sdk.core.lease import Activity, EngineBinding, Lease, Mode, binding_of
from conserve_sdk.core.placement import NoPlacement, Placement, Wanted, place, refusal_receipt
from conserve_sdk.core.prefill import append_threshold_tokens
from conserve_sdk.core.units import MILLION, EngineId, Incarnation, LeaseId, Ms, Tokens
from conserve_sdk.core.views import EngineView
from conserve_sdk.core.vocabulary import DropReason, RefusalReason, Role, SupersedeCause


def request_lease(state: State, event: LeaseRequested) -> None:
    """Grant, or re-grant the live lease of the key."""
    parent = None if event.parent_lease_id is None else state.leases.get(event.parent_lease_id)
    of_tenant = parent is not None and parent.key.tenant == event.key.tenant
    pending = _pending(state, event, lease_id=event.lease_id)
    pending.hint = event.hint
    pending.parent = parent.decoder.engine_id if parent is not None and of_tenant else None
    pending.prefix_key = event.prefix_key
    _take(state, pending)


def supersede(state: State, event: SupersedeRequested) -> None:
    """Replace a lease, if it is still the live one with this epoch; else answer the one that is.

    A move that is not worth it is answered with the live lease; it never waits for room.
    """
    pending = _pending(
        state,
        event,
        lease_id=event.new_lease_id,
        replacing=Replacing(lease_id=event.lease_id, epoch=event.epoch),
        failed_engine_id=event.failed_engine_id,
    )
    pending.failover = event.cause is SupersedeCause.FAILURE
    live = _replaced(state, pending)
    if live is None or pending.failover:
        _take(state, pending)
        return
    _check_ids(state, pending)
    move = re_lease if event.cause is SupersedeCause.RE_LEASE else append
    placement = move(state, live, pending, cached_tokens=event.cached_tokens)
    if placement is None:
        state.counters.stayed[event.cause] += 1
        _reuse(state, pending, live)
    else:
        _grant(state, pending, placement)


def cancel(state: State, event: RequestCancelled) -> None:
    """The caller went away: its request leaves the queue unanswered, and the next in line may fit."""
    if state.queue.remove(event.request_id) is not None:
        state.room_may_have_appeared = True


def admit_waiting(state: State) -> None:
    """Try the heads of the queue as long as room may have appeared (one answer may make room for the next)."""
    while state.room_may_have_appeared:
        state.room_may_have_appeared = False
        state.queue.serve(lambda pending: _tried(state, pending) is None)


def refuse_overdue(state: State) -> None:
    """Refuse every waiting request whose deadline has come; whoever stood behind it gets a look first."""
    while (pending := state.queue.first_overdue(state.now_ms)) is not None:
        _refuse(state, pending, _why_not(state, pending))
        admit_waiting(state)


def answer_waiting(state: State, lease: Lease) -> None:
    """Everyone who waits for this key gets this lease."""
    for pending in state.queue.of_key(lease.key):
        _reuse(state, pending, lease)


def _pending(
    state: State,
    event: LeaseRequested | SupersedeRequested,
    *,
    lease_id: LeaseId,
    replacing: Replacing | None = None,
    failed_engine_id: EngineId | None = None,
) -> Pending:
    exact = event.first_turn_input_tokens > 0
    estimate = state.ratios.tokens(event.key.model, event.first_turn_input_bytes)
    return Pending(
        request_id=event.request_id,
        lease_id=lease_id,
        key=event.key,
        input_tokens=event.first_turn_input_tokens if exact else estimate,
        exact=exact,
        asked_at_ms=event.now_ms,
        deadline_at_ms=Ms(min(event.deadline_at_ms, event.now_ms + state.settings.wait_max_ms)),
        replacing=replacing,
        failed_engine_id=failed_engine_id,
    )


# ---- trying -------------------------------------------------------------------------------------------------


def _check_ids(state: State, pending: Pending) -> None:
    assert pending.request_id not in state.queue, f"request {pending.request_id} already waits"
    assert state.leases.get(pending.lease_id) is None, f"lease id {pending.lease_id} is already live"


def _take(state: State, pending: Pending) -> None:
    _check_ids(state, pending)
    live = _live_answer(state, pending)
    if live is not None:
        _reuse(state, pending, live)
        return
    ahead = state.queue.ahead_of(pending.key)
    if ahead == 0:
        unfit = _tried(state, pending)
        if unfit is None:
            return
    if pending.deadline_at_ms <= state.now_ms:
        _refuse(state, pending, _why_not(state, pending))
    elif len(state.queue) >= state.settings.queue_max:
        _refuse(state, pending, _bounded(RefusalReason.QUEUE_FULL, "the queue is full: retry, or raise queue_max"))
    else:
        state.queue.add(pending)
        state.counters.queued += 1
        state.out.append(Waiting(request_id=pending.request_id, position=ahead + 1))


def _tried(state: State, pending: Pending) -> NoPlacement | None:
    """Answer a request whose turn it is; returns why not when it must wait."""
    if _over_bounds(state, pending):
        _refuse(state, pending, _bounded(RefusalReason.TOO_MANY_LEASES, "too many live leases: release some, retry"))
        return None
    outcome = _placed(state, pending)
    if isinstance(outcome, Placement):
        _grant(state, pending, outcome)
    elif outcome.hopeless:
        _refuse(state, pending, outcome)
    else:
        return outcome
    return None


def _placed(state: State, pending: Pending) -> Placement | NoPlacement:
    engines = state.fleet.views_of_model(pending.key.model)
    return place(_wanted(state, pending), engines, settings=state.settings, now_ms=state.now_ms)


def _why_not(state: State, pending: Pending) -> NoPlacement:
    outcome = _placed(state, pending)
    if isinstance(outcome, NoPlacement):
        return outcome
    return _bounded(RefusalReason.NO_CAPACITY, "earlier requests wait before it: retry with a longer wait_ms")


def _bounded(reason: RefusalReason, detail: str) -> NoPlacement:
    return NoPlacement(reason=reason, detail=detail, hopeless=False, need_tokens=Tokens(0))


def _wanted(state: State, pending: Pending) -> Wanted:
    replaced = _replaced(state, pending)
    freed_tokens = Tokens(0) if replaced is None else replaced.ledger_tokens
    tenant_tokens = state.occupancy.held_by(pending.key.tenant) - freed_tokens
    return Wanted(
        model=pending.key.model,
        input_tokens=pending.input_tokens,
        exact=pending.exact,
        parent=pending.parent,
        hint=pending.hint,
        quota_tokens=state.settings.quota_of(pending.key.tenant).leased_tokens_max,
        tenant_tokens=Tokens(tenant_tokens),
        cached=_cached(state, pending),
        failed_engine_id=pending.failed_engine_id,
        freed_engine_id=None if replaced is None else replaced.decoder.engine_id,
        freed_tokens=freed_tokens,
        waited_ms=state.now_ms - pending.asked_at_ms,
    )


def _cached(state: State, pending: Pending) -> dict[EngineId, Tokens]:
    model = pending.key.model
    if pending.replacing is not None:
        return state.prefixes.cached_by(pending.replacing.lease_id, state.fleet.views_of_model(model))
    if pending.prefix_key:
        return state.prefixes.cached(model, pending.prefix_key, state.fleet.views_of_model(model))
    return {}


def _over_bounds(state: State, pending: Pending) -> bool:
    if _replaced(state, pending) is not None:
        return False
    settings = state.settings
    return (
        len(state.leases) >= settings.leases_max
        or state.leases.count_of(pending.key.tenant) >= settings.quota_of(pending.key.tenant).leases_max
    )


def _replaced(state: State, pending: Pending) -> Lease | None:
    """The live lease this request replaces: compare-and-set on id and epoch."""
    if pending.replacing is None:
        return None
    live = state.leases.live_of(pending.key)
    if live is None:
        return None
    return live if (live.lease_id, live.epoch) == (pending.replacing.lease_id, pending.replacing.epoch) else None


def _live_answer(state: State, pending: Pending) -> Lease | None:
    """The live lease that answers this request as it is."""
    return None if _replaced(state, pending) is not None else state.leases.live_of(pending.key)


# ---- answering ----------------------------------------------------------------------------------------------


def _grant(state: State, pending: Pending, placement: Placement) -> None:
    state.queue.remove(pending.request_id)
    replaced = _replaced(state, pending)
    state.prefixes.enter(pending.lease_id, pending.key.model, pending.prefix_key)
    if replaced is not None:
        state.prefixes.succeed(replaced.lease_id, pending.lease_id)
        state.drop(replaced, DropReason.SUPERSEDED)
    lease = _new_lease(state, pending, placement)
    state.enter(lease)
    state.fleet.dispatch_prefill(lease, tokens=placement.uncached_tokens, now_ms=state.now_ms)
    state.store(lease, fresh=True)
    _count_grant(state, pending, placement)
    state.out.append(Granted(request_id=pending.request_id, lease=lease, reused=False))
    answer_waiting(state, lease)


def _count_grant(state: State, pending: Pending, placement: Placement) -> None:
    counters, receipt = state.counters, placement.receipt
    counters.granted += 1
    counters.failed_over += pending.failover
    counters.spilled += placement.prefiller is None and receipt.prefill_rule == "score"
    counters.decoder_rules[receipt.rule] = counters.decoder_rules.get(receipt.rule, 0) + 1
    counters.prefill_rules[receipt.prefill_rule] = counters.prefill_rules.get(receipt.prefill_rule, 0) + 1
    if pending.replacing is None:
        state.figures.granted(pending.key.model, waited_ms=receipt.waited_ms, uncached_tokens=placement.uncached_tokens)


def _new_lease(state: State, pending: Pending, placement: Placement) -> Lease:
    prefiller, replacing = placement.prefiller, pending.replacing
    return Lease(
        lease_id=pending.lease_id,
        key=pending.key,
        epoch=1 if replacing is None else replacing.epoch + 1,
        mode=Mode.LOCAL if prefiller is None else Mode.MIGRATE,
        prefiller=None if prefiller is None else _binding(prefiller),
        decoder=_binding(placement.decoder),
        granted_at_ms=state.now_ms,
        ttl_ms=state.settings.ttl_ms,
        expires_at_ms=state.expiry_ms(state.settings.ttl_ms),
        ledger_tokens=placement.need_tokens,
        hold_ms=_hold_ms(state, placement),
        append_threshold_tokens=_append_threshold(state, pending, placement),
        supersedes=None if replacing is None else replacing.lease_id,
        receipt=placement.receipt,
        activity_since_ms=state.now_ms,
    )


def _append_threshold(state: State, pending: Pending, placement: Placement) -> Tokens:
    engines = state.fleet.views_of_model(pending.key.model)
    return append_threshold_tokens(
        placement.decoder,
        engines,
        context_tokens=placement.need_tokens,
        cached=state.prefixes.cached_by(pending.lease_id, engines),
        settings=state.settings,
        now_ms=state.now_ms,
    )


def _binding(view: EngineView) -> EngineBinding:
    return binding_of(view.engine_id, view.spec.url, view.incarnation or Incarnation(""))


def _hold_ms(state: State, placement: Placement) -> Ms:
    """How long the decoder may hold this lease's blocks: not at all once holding leases would fill its share."""
    decoder, settings = placement.decoder, state.settings
    if decoder.spec.role is Role.PREFILLER:
        return Ms(0)  # what it hosts must leave it free to prefill
    holding = decoder.kv_holding_tokens + placement.need_tokens
    if holding * MILLION > settings.hold_share_ppm * decoder.kv_capacity_tokens:
        return Ms(0)
    return min(settings.hold_ms, decoder.spec.max_hold_ms)


def _reuse(state: State, pending: Pending, lease: Lease) -> None:
    """Answer with a live lease: it lives on, and a parked one is back in use."""
    state.queue.remove(pending.request_id)
    extended = state.extend(lease)
    if extended.activity is Activity.PARKED:
        extended = extended.after(
            expires_at_ms=extended.expires_at_ms,
            activity=Activity.BUSY,
            activity_since_ms=state.now_ms,
            ledger_tokens=lease.ledger_tokens,
            turns=lease.turns,
            migrations=lease.migrations,
        )
        state.update(lease, extended)
    state.counters.reused += 1
    state.out.append(Granted(request_id=pending.request_id, lease=extended, reused=True))


def _refuse(state: State, pending: Pending, why: NoPlacement) -> None:
    if state.queue.remove(pending.request_id) is not None:
        state.room_may_have_appeared = True
    receipt = refusal_receipt(_wanted(state, pending), why, settings=state.settings)
    state.counters.refused[why.reason] += 1
    state.out.append(
        Refused(
            request_id=pending.request_id,
            reason=why.reason,
            detail=why.detail,
            retry_after_ms=Ms(0) if why.hopeless else state.settings.retry_after_ms,
            receipt=receipt,
        )
    )

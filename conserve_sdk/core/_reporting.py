"""What happens to a live lease: renewals, reports, park, release; and leases that come back from token or journal."""

from __future__ import annotations

from conserve_sdk.core._granting import answer_waiting
from conserve_sdk.core._moving import directive
from conserve_sdk.core._state import State, yes
from conserve_sdk.core.decisions import LeaseAnswered, LeaseDropped, LeasesAnswered
from conserve_sdk.core.events import (
    JournalFollowed,
    LeaseParked,
    LeaseReadopted,
    LeaseReleased,
    LeaseRenewed,
    LeasesRenewed,
    Recovered,
    TurnFinished,
    TurnStarted,
)
from conserve_sdk.core.lease import Activity, Lease, Mode
from conserve_sdk.core.units import FOREVER_MS, LeaseId, Ms, Tokens
from conserve_sdk.core.vocabulary import DropReason, EngineState, LeaseVerdict


def renew(state: State, event: LeaseRenewed) -> None:
    """Extend a lease. A parked one stays parked: only a turn or a new request brings it back."""
    lease = _live(state, event.lease_id)
    if lease is not None:
        state.out.append(_renewed(state, lease))


def renew_all(state: State, event: LeasesRenewed) -> None:
    """Extend each lease. One decision for all of them, for which there may be five hundred."""
    decisions, answers = state.out, []
    for lease_id in event.lease_ids:
        lease = state.leases.get(lease_id)
        answers.append(state.no(lease_id) if lease is None else _renewed(state, lease))
    decisions.append(LeasesAnswered(answers=tuple(answers)))


def turn_started(state: State, event: TurnStarted) -> None:
    """The conversation is busy; what is sent will be in the KV cache, so the ledger is at least that."""
    lease = _live(state, event.lease_id)
    if lease is None:
        return
    ledger_tokens = Tokens(max(lease.ledger_tokens, event.input_tokens))
    if lease.activity is Activity.BUSY and ledger_tokens == lease.ledger_tokens:
        lease = state.extend(lease)
    else:
        ends_ms = state.extended_ms(lease)
        lease = _change(state, lease, activity=Activity.BUSY, expires_at_ms=ends_ms, ledger_tokens=ledger_tokens)
    state.answer_ok(lease, directive(state, lease))


def turn_finished(state: State, event: TurnFinished) -> None:
    """The ledger is exact again; rates and ratios learn from the turn."""
    lease = _live(state, event.lease_id)
    if lease is None:
        # Reports wait for company, so that a lease may have a successor before its transfer is heard of.
        if event.migrated and state.tombstones.take_late_move(event.lease_id):
            state.counters.migrations += 1
        return
    _learn(state, lease, event)
    # A lease moves its KV at most once, whatever is reported (invariant 2).
    migrations = 1 if lease.migrations or (event.migrated and lease.mode is Mode.MIGRATE) else 0
    state.counters.migrations += migrations - lease.migrations
    lease = _change(
        state,
        lease,
        activity=Activity.IDLE if event.idle else Activity.BUSY,
        expires_at_ms=state.extended_ms(lease),
        ledger_tokens=event.context_tokens or lease.ledger_tokens,
        turns=lease.turns + 1,
        migrations=migrations,
    )
    if event.context_tokens:
        state.contexts[lease.lease_id] = event.context_tokens
    state.answer_ok(lease, directive(state, lease))


def park(state: State, event: LeaseParked) -> None:
    """Shorten the lease's life; parking again never lengthens it."""
    lease = _live(state, event.lease_id)
    if lease is None:
        return
    state.counters.parked += 1
    expires_at_ms = Ms(min(lease.expires_at_ms, state.expiry_ms(state.settings.park_ttl_ms)))
    if lease.activity is not Activity.PARKED or expires_at_ms < lease.expires_at_ms:
        lease = _change(state, lease, activity=Activity.PARKED, expires_at_ms=expires_at_ms)
    state.answer_ok(lease)


def release(state: State, event: LeaseReleased) -> None:
    """The conversation is over."""
    lease = _live(state, event.lease_id)
    if lease is None:
        return
    state.drop(lease, DropReason.RELEASED)
    state.answer_ok(lease)


def readopt(state: State, event: LeaseReadopted) -> None:
    """Put a lease back that its holder's token proves, unless this broker knows better."""
    lease = event.lease
    live = state.leases.get(lease.lease_id)
    if live is not None:
        state.answer_ok(live)
        return
    if state.tombstones.get(lease.lease_id) is not None or lease.expires_at_ms <= state.now_ms:
        state.out.append(state.no(lease.lease_id))
        return
    rival = state.leases.live_of(lease.key)
    if rival is not None and rival.epoch >= lease.epoch:
        state.out.append(state.superseded(lease.lease_id, lease.key))
        return
    verdict = _hindrance(state, lease, rival)
    if verdict is not None:
        state.out.append(LeaseAnswered(lease_id=lease.lease_id, verdict=verdict))
        return
    if rival is not None:
        state.drop(rival, DropReason.SUPERSEDED)
    _put_back(state, lease)


def recover(state: State, event: Recovered) -> None:
    """Take the journal's leases, beside those that a standby knows already; each lives at least through the grace."""
    state.spare_until(Ms(event.now_ms + event.grace_ms))
    for lease in sorted([*_contested(state), *event.leases], key=lambda lease: (-lease.epoch, lease.lease_id)):
        if state.leases.live_of(lease.key) is None:
            state.enter(lease)
        else:
            # A journal written by two brokers: the higher epoch is the successor.
            state.out.append(LeaseDropped(lease=lease, reason=DropReason.SUPERSEDED))
    expire_due(state)


def follow(state: State, event: JournalFollowed) -> None:
    """Keep up with the leader: take its rows over as they are, decide nothing."""
    state.spare_until(FOREVER_MS)
    for lease_id in event.dropped:
        _forget(state, lease_id)
    for lease in event.stored:
        _forget(state, lease.lease_id)
        rival = state.leases.live_of(lease.key)
        if rival is not None and (rival.epoch, lease.lease_id) >= (lease.epoch, rival.lease_id):
            state.rivals[lease.lease_id] = lease
            continue
        if rival is not None:
            # Rows are read one by one while the leader goes on, so a predecessor may still be there; not for long.
            state.rivals[rival.lease_id] = state.leave(rival.lease_id)
        state.enter(lease)


def _contested(state: State) -> list[Lease]:
    """Leases of keys for which a standby saw several; none of them is live any more."""
    rivals, state.rivals = list(state.rivals.values()), {}
    holders = (state.leases.live_of(key) for key in {rival.key: None for rival in rivals})
    return rivals + [state.leave(holder.lease_id) for holder in holders if holder is not None]


def _forget(state: State, lease_id: LeaseId) -> None:
    if state.rivals.pop(lease_id, None) is None and state.leases.get(lease_id) is not None:
        state.leave(lease_id)


def expire_due(state: State) -> None:
    """End every lease whose time has come."""
    while (lease := state.leases.first_expired(state.now_ms)) is not None:
        state.drop(lease, DropReason.EXPIRED)


def _live(state: State, lease_id: LeaseId) -> Lease | None:
    lease = state.leases.get(lease_id)
    if lease is None:
        state.out.append(state.no(lease_id))
    return lease


def _renewed(state: State, lease: Lease) -> LeaseAnswered:
    state.counters.renewed += 1
    lease = lease if lease.activity is Activity.PARKED else state.extend(lease)
    return yes(lease, directive(state, lease))


def _change(
    state: State,
    lease: Lease,
    *,
    activity: Activity,
    expires_at_ms: Ms,
    ledger_tokens: Tokens | None = None,
    turns: int | None = None,
    migrations: int | None = None,
) -> Lease:
    since_ms = lease.activity_since_ms if lease.activity is activity else state.now_ms
    changed = lease.after(
        expires_at_ms=expires_at_ms,
        activity=activity,
        activity_since_ms=since_ms,
        ledger_tokens=lease.ledger_tokens if ledger_tokens is None else ledger_tokens,
        turns=lease.turns if turns is None else turns,
        migrations=lease.migrations if migrations is None else migrations,
    )
    state.update(lease, changed)
    return changed


def _learn(state: State, lease: Lease, event: TurnFinished) -> None:
    ahead_tokens = state.fleet.finish_prefill(lease)
    state.ratios.learn(lease.key.model, prompt_tokens=event.prompt_tokens, prompt_bytes=event.prompt_bytes)
    if lease.turns == 0:
        state.prefixes.learn(lease, cached_tokens=event.cached_tokens)
    context_tokens = state.contexts.get(lease.lease_id, 0)
    state.counters.lost_caches += state.fleet.learn_cached(
        lease, expected_tokens=min(context_tokens, event.prompt_tokens), cached_tokens=event.cached_tokens
    )
    engine_id = event.prefill_engine_id
    bound = [binding.engine_id for binding in (lease.prefiller, lease.decoder) if binding is not None]
    if engine_id is not None and engine_id in bound:
        # The time includes the wait for what stood before, so those tokens belong to it too.
        tokens = event.prompt_tokens - event.cached_tokens + ahead_tokens
        state.fleet.learn_rate(engine_id, tokens=tokens, took_ms=event.prefill_ms)


def _hindrance(state: State, lease: Lease, rival: Lease | None) -> LeaseVerdict | None:
    decoder = state.fleet.view(lease.decoder.engine_id)
    if decoder is None or decoder.spec.model != lease.key.model or decoder.state is EngineState.GONE:
        return LeaseVerdict.ENGINE_LOST
    if decoder.incarnation not in {None, lease.decoder.incarnation}:
        return LeaseVerdict.ENGINE_LOST
    settings, tenant = state.settings, lease.key.tenant
    full = (
        len(state.leases) >= settings.leases_max
        or state.leases.count_of(tenant) >= settings.quota_of(tenant).leases_max
    )
    return LeaseVerdict.UNKNOWN if full and rival is None else None


def _put_back(state: State, lease: Lease) -> None:
    if lease.expires_at_ms < state.grace_until_ms:
        lease = lease.until(state.grace_until_ms)
    state.enter(lease)
    state.store(lease, fresh=True)
    state.counters.readopted += 1
    state.answer_ok(lease)
    answer_waiting(state, lease)

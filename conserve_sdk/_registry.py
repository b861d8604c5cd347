"""The leases this process holds, by (conversation, lineage, model). Thread-safe; time comes in as monotonic ms."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from conserve_sdk._fork import call_in_forked_child
from conserve_sdk._jitter import own_random
from conserve_sdk._lease_view import FirstTurnClaim, LeaseRef, LeaseView, ServedTurn, TurnSlot
from conserve_sdk.core.units import ConversationId, LeaseId
from conserve_sdk.protocol import LeaseGrant, LeaseStatus

__all__ = ["FirstTurnClaim", "LeaseRef", "LeaseRegistry", "LeaseView", "ServedTurn", "TurnSlot"]

IN_USE_MAX_MS = 1_800_000
"""A lease whose tool (or abandoned stream) gives no sign for this long is not renewed any more."""

RENEW_AFTER_MIN_MS = 100
"""However short a life a broker grants, a process does not renew more often than this."""


@dataclass(slots=True)
class _Entry:
    ref: LeaseRef
    grant: LeaseGrant | None = None
    as_of_ms: int = 0
    expires_at_ms: int = 0
    renew_at_ms: int = 0
    lost: str = ""
    migrated: bool = False
    turns: int = 0
    in_flight: int = 0
    loop_arrived_at_ms: int | None = None
    waits_for_tools: bool = False
    used_at_ms: int = 0
    directive: str = ""
    directive_as_of_ms: int = 0
    served: ServedTurn | None = None

    def is_live(self, now_ms: int) -> bool:
        return self.grant is not None and not self.lost and now_ms < self.expires_at_ms

    def is_in_use(self) -> bool:
        return self.in_flight > 0 or self.waits_for_tools


@dataclass(slots=True)
class _Flight:
    leader: Future[LeaseGrant | None]
    followers: list[Future[LeaseGrant | None]] = field(default_factory=list)


class LeaseRegistry:
    """All entries of one ConServe object.

    Args:
        entries_max: entries kept; the least recently used ones that are not in use go first.
        jitter: uniform in [0, 1): spreads renewals over 80 to 100 % of the time the broker asked for.
    """

    def __init__(self, *, entries_max: int = 50_000, jitter: Callable[[], float] = own_random) -> None:
        self._entries_max = entries_max
        self._jitter = jitter
        self._start_afresh()
        call_in_forked_child(self._start_afresh)

    def view(self, ref: LeaseRef, *, now_ms: int) -> LeaseView:
        """Return a snapshot of the entry; an empty one when there is none."""
        with self._lock:
            entry = self._entries.get(ref)
            return _snapshot(entry, now_ms) if entry else LeaseView(ref=ref)

    def grant_of(self, ref: LeaseRef) -> LeaseGrant | None:
        """Return the newest grant of the entry, live or not."""
        with self._lock:
            entry = self._entries.get(ref)
            return entry.grant if entry else None

    def served_of(self, ref: LeaseRef) -> ServedTurn | None:
        """Return the newest turn of the entry whose engine gave its usage."""
        with self._lock:
            entry = self._entries.get(ref)
            return entry.served if entry else None

    def views(self, conversation: ConversationId, *, now_ms: int) -> tuple[LeaseView, ...]:
        """Return snapshots of all entries of a conversation, the oldest first."""
        with self._lock:
            refs = self._by_conversation.get(conversation, {})
            return tuple(_snapshot(self._entries[ref], now_ms) for ref in refs)

    def claim(self, ref: LeaseRef) -> FirstTurnClaim:
        """Become the leader of this lineage's first turn, or a follower of the leader there is."""
        future: Future[LeaseGrant | None] = Future()
        with self._lock:
            flight = self._flights.get(ref)
            if flight is None:
                self._flights[ref] = _Flight(leader=future)
            else:
                flight.followers.append(future)
            return FirstTurnClaim(ref=ref, leader=flight is None, future=future)

    def settle(self, claim: FirstTurnClaim, grant: LeaseGrant | None) -> None:
        """End the leader's flight and wake its followers. Idempotent; must be called on every path out.

        Args:
            claim: the leader's; a follower's claim changes nothing.
            grant: the lease the followers may use, or None: the next one to claim becomes the leader.
        """
        with self._lock:
            flight = self._flights.get(claim.ref)
            if flight is None or flight.leader is not claim.future:
                return
            del self._flights[claim.ref]
        for future in (flight.leader, *flight.followers):  # outside the lock: callbacks run here
            if future.set_running_or_notify_cancel():
                future.set_result(grant)

    def store(self, ref: LeaseRef, grant: LeaseGrant, *, sent_at_ms: int) -> LeaseView:
        """Keep a grant.

        Args:
            ref: the entry.
            grant: as answered.
            sent_at_ms: when its request was sent; its life is counted from there, so never too long.
        """
        with self._lock:
            entry = self._entry(ref)
            self._forget_tokens(entry)
            fresh = entry.grant is None or entry.grant.lease_id != grant.lease_id
            served = grant.mode == "local" or grant.migrations > 0 or grant.turns > 0
            # Granted to somebody else before: the one migration is theirs, even if they have not reported it yet.
            claimed = grant.reused and fresh
            entry.migrated = served or claimed or (entry.migrated and not fresh)
            if fresh:
                entry.directive = ""  # it spoke of the lease before
            entry.grant = grant
            entry.lost = ""
            self._by_lease[LeaseId(grant.lease_id)] = ref
            self._by_token[grant.token] = LeaseId(grant.lease_id)
            entry.as_of_ms = min(entry.as_of_ms, sent_at_ms)
            self._extend(entry, grant, sent_at_ms, grant.expires_in_ms)
            return _snapshot(entry, sent_at_ms)

    def mark_migrated(self, lease_id: LeaseId) -> None:
        """Note that the lease's single KV transfer is done, or given up for good."""
        with self._lock:
            for entry, _ in self._current(lease_id):
                entry.migrated = True

    def mark_followed(self, lease_id: LeaseId, *, now_ms: int) -> None:
        """Note that the lease's directive was followed, as far as it could be: only a later one counts again."""
        with self._lock:
            for entry, _ in self._current(lease_id):
                entry.directive = ""
                entry.directive_as_of_ms = now_ms

    def mark_served(self, ref: LeaseRef, served: ServedTurn) -> None:
        """Note what a turn left in its decoder's cache."""
        with self._lock:
            entry = self._entries.get(ref)
            if entry is not None:
                entry.served = served

    def mark_lost(self, lease_id: LeaseId, reason: str) -> None:
        """Note that the lease is of no more use; the next turn of its lineage asks the broker again."""
        with self._lock:
            for entry, _ in self._current(lease_id):
                entry.lost = reason

    def begin_turn(self, ref: LeaseRef, *, arrived_at_ms: int) -> TurnSlot:
        """Count a turn; opens a tool loop if none is running."""
        with self._lock:
            entry = self._entry(ref)
            entry.turns += 1
            entry.in_flight += 1
            entry.used_at_ms = max(entry.used_at_ms, arrived_at_ms)
            if entry.loop_arrived_at_ms is None:
                entry.loop_arrived_at_ms = arrived_at_ms
            self._in_use[ref] = None
            return TurnSlot(entry.turns, entry.loop_arrived_at_ms)

    def end_turn(self, ref: LeaseRef, *, now_ms: int, loop_goes_on: bool, waits_for_tools: bool | None = None) -> None:
        """End a turn.

        Args:
            ref: the entry.
            now_ms: when it ended.
            loop_goes_on: it ended in tool calls, or failed and may be tried again: the next turn belongs to its loop.
            waits_for_tools: the lease is renewed until the next turn; `loop_goes_on` when None. Else the lease is left
                to its time: KV is held neither for a human nor for an application that may have gone.
        """
        with self._lock:
            entry = self._entries.get(ref)
            if entry is None:
                return
            entry.in_flight = max(0, entry.in_flight - 1)
            entry.used_at_ms = max(entry.used_at_ms, now_ms)
            if not loop_goes_on:
                entry.loop_arrived_at_ms = None
            entry.waits_for_tools = loop_goes_on if waits_for_tools is None else waits_for_tools
            if not entry.is_in_use():
                self._in_use.pop(ref, None)

    def apply_status(self, status: LeaseStatus, *, sent_at_ms: int, lease_id: LeaseId | None = None) -> None:
        """Take in the broker's verdict on a report or renewal: a longer life, a fresh token, a directive, or a loss.

        Args:
            status: the verdict.
            sent_at_ms: when the report or renewal was sent.
            lease_id: whose token it carried, where the broker could not read that itself.
        """
        with self._lock:
            for entry, grant in self._current(lease_id or LeaseId(status.lease_id)):
                if status.verdict != "ok":
                    entry.lost = entry.lost or status.verdict
                    continue
                entry.grant = self._replace_token(grant, status.token) if status.token else grant
                _direct(entry, status, sent_at_ms)
                self._extend(entry, grant, sent_at_ms, status.expires_in_ms)

    def lease_of_token(self, token: str) -> LeaseId | None:
        """Return the lease whose current token this is."""
        with self._lock:
            return self._by_token.get(token)

    def due_renewals(self, *, now_ms: int) -> list[LeaseGrant]:
        """Return the grants to renew now: live, in use, and past their renewal time."""
        with self._lock:
            return [entry.grant for entry in self._renewable(now_ms) if entry.grant and entry.renew_at_ms <= now_ms]

    def next_renewal_ms(self, *, now_ms: int) -> int | None:
        """Return when the next renewal falls due, None when no lease is in use."""
        with self._lock:
            return min((entry.renew_at_ms for entry in self._renewable(now_ms)), default=None)

    def idle(self, conversation: ConversationId, *, now_ms: int) -> int:
        """Renew no lease of a conversation any more until its next turn; returns how many were still being renewed.

        Turns that are running go on, and so do their leases.
        """
        with self._lock:
            waiting = [self._entries[ref] for ref in self._by_conversation.get(conversation, {})]
            waiting = [entry for entry in waiting if entry.waits_for_tools and not entry.in_flight]
            for entry in waiting:
                entry.waits_for_tools = False
                entry.loop_arrived_at_ms = None
                self._in_use.pop(entry.ref, None)
            return sum(entry.is_live(now_ms) for entry in waiting)

    def drop(self, ref: LeaseRef) -> LeaseGrant | None:
        """Forget an entry and return its grant."""
        with self._lock:
            entry = self._remove(ref)
            return entry.grant if entry else None

    def retire(self, ref: LeaseRef, *, now_ms: int) -> LeaseGrant | None:
        """Forget an entry that nothing will use any more; return its grant if it is live, to be released.

        An entry with a turn in flight stays as it is. One that waits for a tool does not: what it waits for has gone
        into the history that replaces it.
        """
        with self._lock:
            entry = self._entries.get(ref)
            if entry is None or entry.in_flight:
                return None
            self._remove(ref)
            return entry.grant if entry.is_live(now_ms) else None

    def forget(self, conversation: ConversationId, *, now_ms: int) -> list[LeaseGrant]:
        """Forget a conversation and return the grants that are live, to be released."""
        with self._lock:
            removed = [self._remove(ref) for ref in tuple(self._by_conversation.get(conversation, {}))]
            return [entry.grant for entry in removed if entry and entry.grant and entry.is_live(now_ms)]

    def live_grants(self, *, now_ms: int) -> list[LeaseGrant]:
        """Return every live grant, to be released at close."""
        with self._lock:
            return [entry.grant for entry in self._entries.values() if entry.grant and entry.is_live(now_ms)]

    def _start_afresh(self) -> None:
        # Also in a forked child: leases stay the parent's; asking the broker for the same key gives the same lease.
        self._lock = threading.Lock()
        self._entries: OrderedDict[LeaseRef, _Entry] = OrderedDict()
        self._by_conversation: dict[ConversationId, dict[LeaseRef, None]] = {}
        self._by_lease: dict[LeaseId, LeaseRef] = {}
        self._by_token: dict[str, LeaseId] = {}
        self._in_use: dict[LeaseRef, None] = {}
        self._flights: dict[LeaseRef, _Flight] = {}

    def _entry(self, ref: LeaseRef) -> _Entry:
        entry = self._entries.get(ref)
        if entry is None:
            entry = self._entries[ref] = _Entry(ref)
            self._by_conversation.setdefault(ref.conversation_id, {})[ref] = None
            self._evict(keep=ref)
        self._entries.move_to_end(ref)
        return entry

    def _evict(self, *, keep: LeaseRef) -> None:
        if len(self._entries) <= self._entries_max:
            return
        idle = (ref for ref, entry in self._entries.items() if ref != keep and not entry.is_in_use())
        oldest = next(idle, None)
        if oldest is not None:
            self._remove(oldest)

    def _remove(self, ref: LeaseRef) -> _Entry | None:
        entry = self._entries.pop(ref, None)
        if entry is None:
            return None
        self._forget_tokens(entry)
        self._in_use.pop(ref, None)
        siblings = self._by_conversation[ref.conversation_id]
        del siblings[ref]
        if not siblings:
            del self._by_conversation[ref.conversation_id]
        return entry

    def _current(self, lease_id: LeaseId) -> Iterator[tuple[_Entry, LeaseGrant]]:
        """The entry whose newest grant is this lease, with that grant, if any."""
        ref = self._by_lease.get(lease_id)
        entry = self._entries[ref] if ref is not None else None
        if entry is not None and entry.grant is not None:
            yield entry, entry.grant

    def _renewable(self, now_ms: int) -> Iterator[_Entry]:
        for ref in self._in_use:
            entry = self._entries[ref]
            if entry.is_live(now_ms) and now_ms - entry.used_at_ms < IN_USE_MAX_MS:
                yield entry

    def _extend(self, entry: _Entry, grant: LeaseGrant, sent_at_ms: int, expires_in_ms: int) -> None:
        if sent_at_ms < entry.as_of_ms:  # an answer that was overtaken by a later one
            return
        entry.as_of_ms = sent_at_ms
        entry.expires_at_ms = sent_at_ms + expires_in_ms  # may be less than before: the lease was parked
        spread = 0.8 + 0.2 * self._jitter()
        renew_after_ms = int(min(grant.renew_after_ms, expires_in_ms / 2) * spread)
        entry.renew_at_ms = sent_at_ms + max(renew_after_ms, RENEW_AFTER_MIN_MS)

    def _replace_token(self, grant: LeaseGrant, token: str) -> LeaseGrant:
        self._by_token.pop(grant.token, None)
        self._by_token[token] = LeaseId(grant.lease_id)
        return grant.model_copy(update={"token": token})

    def _forget_tokens(self, entry: _Entry) -> None:
        if entry.grant is not None:
            self._by_token.pop(entry.grant.token, None)
            self._by_lease.pop(LeaseId(entry.grant.lease_id), None)


def _snapshot(entry: _Entry, now_ms: int) -> LeaseView:
    return LeaseView(
        ref=entry.ref,
        grant=entry.grant,
        live=entry.is_live(now_ms),
        lost=entry.lost,
        migrated=entry.migrated,
        turns=entry.turns,
        directive=entry.directive,
        served=entry.served,
    )


def _direct(entry: _Entry, status: LeaseStatus, sent_at_ms: int) -> None:
    """Keep the broker's newest word on where the lease should be; one that was overtaken changes nothing."""
    if sent_at_ms < entry.directive_as_of_ms:
        return
    entry.directive_as_of_ms = sent_at_ms
    entry.directive = "" if status.directive == "none" else status.directive_reason or status.directive

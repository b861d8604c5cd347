"""Everything that clients can do to a broker, as rules of its state machine."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from conserve_sdk.core import (
    Decision,
    EngineId,
    LeaseAnswered,
    LeaseParked,
    LeaseReadopted,
    LeaseReleased,
    LeaseRenewed,
    LeasesAnswered,
    LeasesRenewed,
    Ms,
    PrefixKey,
    RequestCancelled,
    SupersedeCause,
    TimerFired,
    Tokens,
    TurnStarted,
)
from tests.core.machine import CHOICE, CONVERSATIONS, ENGINES, PATIENCE, PREFIXES, SIZES, TENANTS, MachineBase


class ClientRules(MachineBase):
    """Asking, superseding, reporting, parking, releasing and coming back."""

    @rule(
        crowd=st.lists(st.tuples(CONVERSATIONS, TENANTS, SIZES, PATIENCE), min_size=1, max_size=6),
        hint=st.none() | ENGINES,
        prefix=PREFIXES,
        parent=st.none() | CHOICE,
    )
    def request(
        self, crowd: list[tuple[str, str, int, int]], hint: EngineId | None, prefix: str, parent: int | None
    ) -> None:
        known = list(self.oracle.first)
        for conversation, tenant, tokens, wait_ms in crowd:
            self._request(
                conversation,
                tenant,
                tokens,
                wait_ms,
                hint,
                prefix_key=PrefixKey(prefix),
                parent_lease_id=None if parent is None or not known else known[parent % len(known)],
            )

    @rule(conversation=CONVERSATIONS, tenant=TENANTS, tokens=SIZES, wait_ms=PATIENCE)
    def request_one(self, conversation: str, tenant: str, tokens: int, wait_ms: int) -> None:
        self._request(conversation, tenant, tokens, wait_ms, None)

    @precondition(lambda self: self.oracle.first)
    @rule(
        pick=CHOICE,
        live=st.booleans(),
        ahead=st.sampled_from([0, 0, 0, -1, 1]),
        tokens=SIZES,
        wait_ms=PATIENCE,
        failed=st.none() | ENGINES,
        cause=st.sampled_from(SupersedeCause),
        cached=st.sampled_from([0, 90, 300]),
    )
    def supersede(
        self,
        pick: int,
        live: bool,
        ahead: int,
        tokens: int,
        wait_ms: int,
        failed: EngineId | None,
        cause: SupersedeCause,
        cached: int,
    ) -> None:
        lease = self._pick(pick, live=live)
        self._supersede(
            lease,
            tokens,
            wait_ms=wait_ms,
            epoch=lease.epoch + ahead,
            failed_engine_id=failed,
            cause=cause,
            cached_tokens=Tokens(cached),
        )

    @precondition(lambda self: self.oracle.ends)
    @rule(pick=CHOICE, tokens=SIZES, late_ms=st.sampled_from([-1, 0, 1]), drain=st.booleans())
    def follow_a_directive(self, pick: int, tokens: int, late_ms: int, drain: bool) -> None:
        """Drain or load a decoder, end the turn there, and come back just around the shortest gap that moves."""
        lease = self._pick(pick)
        if drain:
            self._trouble(lease.decoder.engine_id, "drain")
        self._end(lease, tokens)
        self._at(self.now_ms + self.settings.placement.move_idle_ms + late_ms)
        self._supersede(self._pick(pick), tokens, cause=SupersedeCause.RE_LEASE, cached_tokens=Tokens(tokens))

    @precondition(lambda self: self.oracle.first)
    @rule(pick=CHOICE, late_ms=st.sampled_from([-1, 0, 1]), tokens=SIZES)
    def wait_until_cold(self, pick: int, late_ms: int, tokens: int) -> None:
        """A lease goes idle while others wait, and time comes to just around the end of TAU."""
        self._end(self._pick(pick), tokens)
        self._at(self.now_ms + self.settings.placement.idle_after_ms + late_ms)

    @precondition(lambda self: self.oracle.pending)
    @rule(pick=CHOICE)
    def cancel(self, pick: int) -> None:
        waiting = list(self.oracle.pending)
        self._apply(RequestCancelled(now_ms=Ms(self.now_ms), request_id=waiting[pick % len(waiting)]))

    @precondition(lambda self: self.oracle.first)
    @rule(pick=CHOICE, live=st.booleans())
    def renew(self, pick: int, live: bool) -> None:
        self._apply(LeaseRenewed(now_ms=Ms(self.now_ms), lease_id=self._pick(pick, live=live).lease_id))

    @precondition(lambda self: self.oracle.first)
    @rule(picks=st.lists(st.tuples(CHOICE, st.booleans()), max_size=4))
    def renew_many(self, picks: list[tuple[int, bool]]) -> None:
        """A batch of renewals is what they are one by one, which the twin takes them."""
        now_ms = Ms(self.now_ms)
        lease_ids = tuple(self._pick(pick, live=live).lease_id for pick, live in picks)
        together = self.broker.apply(LeasesRenewed(now_ms=now_ms, lease_ids=lease_ids))
        singly: list[Decision] = []
        for event in [LeaseRenewed(now_ms=now_ms, lease_id=each) for each in lease_ids] or [TimerFired(now_ms=now_ms)]:
            decisions = self.twin.apply(event)
            self.oracle.follow(event, decisions)
            singly += decisions
        (batch,) = [each for each in together if isinstance(each, LeasesAnswered)]
        assert list(batch.answers) == [each for each in singly if isinstance(each, LeaseAnswered)]
        others = [each for each in singly if not isinstance(each, LeaseAnswered)]
        assert [each for each in together if each is not batch] == others

    @precondition(lambda self: self.oracle.first)
    @rule(pick=CHOICE, tokens=SIZES)
    def begin_turn(self, pick: int, tokens: int) -> None:
        lease_id = self._pick(pick).lease_id
        self._apply(TurnStarted(now_ms=Ms(self.now_ms), lease_id=lease_id, input_tokens=Tokens(tokens)))

    @precondition(lambda self: self.oracle.first)
    @rule(
        pick=CHOICE, context=st.just(0) | SIZES, migrated=st.booleans(), idle=st.booleans(), took_ms=st.integers(0, 90)
    )
    def end_turn(self, pick: int, context: int, migrated: bool, idle: bool, took_ms: int) -> None:
        lease = self._pick(pick)
        self._end(
            lease,
            context,
            prompt_bytes=4 * context,
            cached_tokens=Tokens(0),
            prefill_ms=Ms(took_ms),
            prefill_engine_id=(lease.prefiller or lease.decoder).engine_id,
            migrated=migrated,
            idle=idle,
        )

    @precondition(lambda self: self.oracle.first)
    @rule(pick=CHOICE)
    def park(self, pick: int) -> None:
        self._apply(LeaseParked(now_ms=Ms(self.now_ms), lease_id=self._pick(pick).lease_id))

    @precondition(lambda self: self.oracle.first)
    @rule(pick=CHOICE)
    def release(self, pick: int) -> None:
        self._apply(LeaseReleased(now_ms=Ms(self.now_ms), lease_id=self._pick(pick).lease_id))

    @precondition(lambda self: self.oracle.first)
    @rule(pick=CHOICE, live=st.booleans(), left_ms=st.sampled_from([0, 1, 900]))
    def readopt(self, pick: int, live: bool, left_ms: int) -> None:
        lease = self._pick(pick, live=live)
        self._apply(
            LeaseReadopted(now_ms=Ms(self.now_ms), lease=replace(lease, expires_at_ms=Ms(self.now_ms + left_ms)))
        )

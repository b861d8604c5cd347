"""The broker under arbitrary histories: an oracle checks the ten invariants after every step.

Time is whole milliseconds, and one rule lands exactly on, just before or just after the next deadline: boundaries are
met on purpose, not by luck. A twin whose engines were configured in the opposite order must decide the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from conserve_sdk.core import (
    AFFINITY,
    DEFAULT,
    PAPER,
    Broker,
    BrokerSettings,
    Decision,
    EngineConfigured,
    EngineDrained,
    EngineFailureReported,
    EngineId,
    EngineRemoved,
    EngineRestarted,
    EngineSpec,
    EngineUnreachable,
    Event,
    Incarnation,
    JournalFollowed,
    Lease,
    LeaseId,
    LeaseParked,
    LeaseReadopted,
    LeaseReleased,
    LeaseRenewed,
    LeaseRequested,
    Ms,
    PlacementSettings,
    Ppm,
    PrefillerHosts,
    PrefixKey,
    Recovered,
    RequestCancelled,
    RequestId,
    Role,
    SupersedeCause,
    SupersedeRequested,
    TimerFired,
    Tokens,
    TurnFinished,
    TurnStarted,
)
from tests.core.oracle import Oracle
from tests.core.world import key, observed, spec

FLEET = [
    spec("b0", Role.BOTH),
    spec("d0"),
    spec("d1", host_tier_tokens=Tokens(1_500)),
    spec("p0", Role.PREFILLER),
    spec("p1", Role.PREFILLER, host_tier_tokens=Tokens(1_500)),
]
ENGINES = st.sampled_from([each.engine_id for each in FLEET])
CONVERSATIONS = st.sampled_from(["c0", "c1", "c2", "c3", "c4"])
TENANTS = st.sampled_from(["t", "t", "u"])
SIZES = st.sampled_from([100, 300, 300, 500, 500, 890, 891])
PATIENCE = st.sampled_from([0, 500, 500, 4_000])
CHOICE = st.integers(0, 1_000)


PREFIXES = st.sampled_from(["", "", "tools"])
"""Any preset with any of its switches turned: the rules are independent of each other."""
SWITCHES = st.fixed_dictionaries(
    {
        "idle_aware": st.booleans(),
        "idle_after_ms": st.sampled_from([Ms(150), Ms(150), Ms(5_000)]),
        "oversubscription_ppm": st.sampled_from([Ppm(1_000_000), Ppm(1_780_000), Ppm(3_000_000)]),
        "leased_weight_ppm": st.sampled_from([Ppm(0), Ppm(250_000)]),
        "prefiller_hosts": st.sampled_from(list(PrefillerHosts)),
        "prefill_share_window_ms": st.sampled_from([Ms(100), Ms(20_000)]),
        "move_appends": st.booleans(),
        "re_lease": st.booleans(),
        "move_threshold_ppm": st.sampled_from([Ppm(0), Ppm(300_000)]),
        "move_rest_ms": st.sampled_from([Ms(0), Ms(200)]),
        "reserve_tokens": st.just(Tokens(0)),
    }
)


def broker_settings(placement: PlacementSettings, *, quota_tokens: int) -> BrokerSettings:
    return BrokerSettings(
        placement=placement,
        leased_tokens_per_tenant_max=Tokens(quota_tokens),
        ttl_ms=Ms(1_000),
        park_ttl_ms=Ms(100),
        hold_ms=Ms(400),
        suspect_after_ms=Ms(300),
        gone_after_ms=Ms(1_500),
        observation_max_age_ms=Ms(2_000),
        leases_max=6,
        leases_per_tenant_max=5,
        queue_max=4,
        wait_max_ms=Ms(3_000),
        backlog_max_age_ms=Ms(700),
    )


class BrokerMachine(RuleBasedStateMachine):
    """Everything that clients, engines, operators and the clock can do."""

    placement: PlacementSettings

    @initialize(switches=st.just({}) | SWITCHES, quota=st.sampled_from([0, 0, 900]))
    def start(self, switches: dict[str, Any], quota: int) -> None:
        self.now_ms = 0
        self.serial = 0
        self.prefilled = dict.fromkeys([each.engine_id for each in FLEET], 0)
        self.settings = broker_settings(replace(self.placement, **switches), quota_tokens=quota)
        self.oracle = Oracle(self.settings)
        self.broker, self.twin = Broker(self.settings), Broker(self.settings)
        self._configure(FLEET)
        for each in FLEET:
            self._see(each.engine_id)

    # ---- clients ----

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

    def _request(
        self, conversation: str, tenant: str, tokens: int, wait_ms: int, hint: EngineId | None, **more: Any
    ) -> None:
        self.serial += 1
        self._apply(
            LeaseRequested(
                now_ms=Ms(self.now_ms),
                request_id=RequestId(f"r{self.serial}"),
                lease_id=LeaseId(f"l{self.serial}"),
                key=key(conversation, tenant=tenant),
                first_turn_input_tokens=Tokens(tokens),
                first_turn_input_bytes=0,
                deadline_at_ms=Ms(self.now_ms + wait_ms),
                hint=hint,
                **more,
            )
        )

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
        self.serial += 1
        self._apply(
            SupersedeRequested(
                now_ms=Ms(self.now_ms),
                request_id=RequestId(f"r{self.serial}"),
                lease_id=lease.lease_id,
                new_lease_id=LeaseId(f"l{self.serial}"),
                key=lease.key,
                epoch=lease.epoch + ahead,
                reason="engine failed",
                first_turn_input_tokens=Tokens(tokens),
                first_turn_input_bytes=0,
                deadline_at_ms=Ms(self.now_ms + wait_ms),
                failed_engine_id=failed,
                cause=cause,
                cached_tokens=Tokens(cached),
            )
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

    def _end(self, lease: Lease, context: int) -> None:
        self._apply(
            TurnFinished(
                now_ms=Ms(self.now_ms),
                lease_id=lease.lease_id,
                context_tokens=Tokens(context),
                prompt_tokens=Tokens(context),
                prompt_bytes=0,
                cached_tokens=Tokens(context // 3),
                prefill_ms=Ms(0),
                prefill_engine_id=None,
                migrated=False,
            )
        )

    def _supersede(self, lease: Lease, tokens: int, **more: Any) -> None:
        self.serial += 1
        self._apply(
            SupersedeRequested(
                now_ms=Ms(self.now_ms),
                request_id=RequestId(f"r{self.serial}"),
                lease_id=lease.lease_id,
                new_lease_id=LeaseId(f"l{self.serial}"),
                key=lease.key,
                epoch=lease.epoch,
                reason="told to",
                first_turn_input_tokens=Tokens(tokens),
                first_turn_input_bytes=0,
                deadline_at_ms=Ms(self.now_ms),
                **more,
            )
        )

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
        self._apply(
            TurnFinished(
                now_ms=Ms(self.now_ms),
                lease_id=lease.lease_id,
                context_tokens=Tokens(context),
                prompt_tokens=Tokens(context),
                prompt_bytes=4 * context,
                cached_tokens=Tokens(0),
                prefill_ms=Ms(took_ms),
                prefill_engine_id=(lease.prefiller or lease.decoder).engine_id,
                migrated=migrated,
                idle=idle,
            )
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

    # ---- engines and operators ----

    @rule(engine_id=ENGINES, used=st.sampled_from([0, 0, 400, 1_000]), prefilled=st.sampled_from([0, 40, 4_000]))
    def observe(self, engine_id: EngineId, used: int, prefilled: int) -> None:
        self.prefilled[engine_id] += prefilled
        self._see(engine_id, used=used)

    @rule(
        engine_id=ENGINES,
        kind=st.sampled_from(
            ["fail", "fail all", "blame", "blame old", "drain", "undrain", "restart", "reborn", "reborn late", "remove"]
        ),
    )
    def trouble(self, engine_id: EngineId, kind: str) -> None:
        self._trouble(engine_id, kind)

    def _trouble(self, engine_id: EngineId, kind: str) -> None:
        now_ms = Ms(self.now_ms)
        match kind:
            case "fail":
                self._apply(EngineUnreachable(now_ms=now_ms, engine_id=engine_id, detail="refused"))
            case "fail all":
                for each in sorted(self.oracle.engines):
                    self._apply(EngineUnreachable(now_ms=now_ms, engine_id=each, detail="refused"))
            case "blame" | "blame old":
                incarnation = self._incarnation(engine_id) if kind == "blame" else Incarnation("old")
                self._apply(
                    EngineFailureReported(now_ms=now_ms, engine_id=engine_id, incarnation=incarnation, detail="refused")
                )
            case "drain" | "undrain":
                self._apply(EngineDrained(now_ms=now_ms, engine_id=engine_id, draining=kind == "drain"))
            case "restart":
                self._see(engine_id, again=False)
            case "reborn" | "reborn late":
                before = self._incarnation(engine_id) if kind == "reborn" else Incarnation("old")
                word = Incarnation(f"{before}, by its own word")
                self._apply(EngineRestarted(now_ms=now_ms, engine_id=engine_id, before=before, incarnation=word))
            case _:
                self._apply(EngineRemoved(now_ms=now_ms, engine_id=engine_id))

    @precondition(lambda self: self.oracle.ends)
    @rule(pick=CHOICE, kind=st.sampled_from(["restart", "reborn", "gone", "remove"]), late_ms=st.sampled_from([-1, 0]))
    def lose_a_decoder(self, pick: int, kind: str, late_ms: int) -> None:
        """Aim at a decoder that hosts something."""
        engine_id = self._pick(pick).decoder.engine_id
        if kind != "gone":
            self._trouble(engine_id, kind)
            return
        self._scrape()
        self._apply(EngineUnreachable(now_ms=Ms(self.now_ms), engine_id=engine_id, detail="refused"))
        for lease in list(self.broker.leases()):
            self._apply(LeaseRenewed(now_ms=Ms(self.now_ms), lease_id=lease.lease_id))
        self._at(self.now_ms + 700)
        for lease in list(self.broker.leases()):
            self._apply(LeaseRenewed(now_ms=Ms(self.now_ms), lease_id=lease.lease_id))
        self._at(self.now_ms + 800 + late_ms)

    @rule()
    def repair(self) -> None:
        """Everything is configured, undrained and scraped again."""
        self._configure([each for each in FLEET if each.engine_id not in self.oracle.engines])
        for each in FLEET:
            self._apply(EngineDrained(now_ms=Ms(self.now_ms), engine_id=each.engine_id, draining=False))
        self._scrape()

    # ---- time and restarts ----

    @rule(span_ms=st.integers(0, 400), scraped=st.booleans())
    def wait(self, span_ms: int, scraped: bool) -> None:
        self._at(self.now_ms + span_ms)
        if scraped:
            self._scrape()

    @precondition(lambda self: self.broker.next_deadline_ms() is not None)
    @rule(late_ms=st.sampled_from([-1, 0, 1]), scraped=st.booleans())
    def wait_for_next_deadline(self, late_ms: int, scraped: bool) -> None:
        deadline_ms = self.broker.next_deadline_ms()
        assert deadline_ms is not None
        if scraped:
            self._scrape()
        self._at(max(self.now_ms, deadline_ms + late_ms))

    @precondition(lambda self: self.oracle.pending)
    @rule(pick=CHOICE, late_ms=st.sampled_from([-1, 0, 1]))
    def wait_as_long_as_a_request(self, pick: int, late_ms: int) -> None:
        waiting = list(self.oracle.pending.values())
        self._at(max(self.now_ms, self.oracle.deadline_ms(waiting[pick % len(waiting)]) + late_ms))

    @precondition(lambda self: self.oracle.first)
    @rule(pick=CHOICE, late_ms=st.sampled_from([-1, 0, 1]))
    def renew_around_expiry(self, pick: int, late_ms: int) -> None:
        lease = self._pick(pick, live=True)
        self.now_ms = max(self.now_ms, self.oracle.ends.get(lease.lease_id, 0) + late_ms)
        self._apply(LeaseRenewed(now_ms=Ms(self.now_ms), lease_id=lease.lease_id))

    @rule(
        grace_ms=st.sampled_from([0, 300, 1_500]),
        scraped=st.sampled_from([True, True, False]),
        followed=st.sampled_from([0, 0, 1, 99]),
    )
    def restart(self, grace_ms: int, scraped: bool, followed: int) -> None:
        """Kill the broker and recover from what the journal holds (invariants 7 and 8), or let a standby lead."""
        rows = tuple(self.oracle.rows.values())
        self.broker, self.twin = Broker(self.settings), Broker(self.settings)
        event = Recovered(now_ms=Ms(self.now_ms), leases=rows[followed:], grace_ms=Ms(grace_ms))
        if followed:
            old = tuple(replace(row, ledger_tokens=Tokens(7)) for row in rows[:followed])
            gone = tuple(replace(row, lease_id=LeaseId(f"{row.lease_id}-gone"), epoch=row.epoch - 1) for row in old)
            self.broker.apply(JournalFollowed(now_ms=Ms(0), stored=(*gone, *old)))
            dropped = tuple(row.lease_id for row in gone)
            self.broker.apply(JournalFollowed(now_ms=Ms(self.now_ms), stored=rows[:followed], dropped=dropped))
            for row in rows[:followed]:
                self.twin.apply(JournalFollowed(now_ms=Ms(self.now_ms), stored=(row,)))
        decisions = self.broker.apply(event)
        assert self.twin.apply(replace(event, leases=rows[followed:][::-1])) == decisions
        self.oracle.restart(event, decisions)
        self._configure(FLEET)
        if scraped:
            self.the_books_agree()
            self._scrape()

    # ---- checks ----

    @invariant()
    def the_books_agree(self) -> None:
        self.oracle.check(self.broker)

    @invariant()
    def nothing_is_kept_of_leases_that_ended(self) -> None:
        state = self.broker._state
        live = {lease.lease_id for lease in self.broker.leases()}
        assert {*state.contexts, *state.directives, *state.prefixes._of_lease} <= live

    def teardown(self) -> None:
        """In the end everyone leaves, and nothing is left in any ledger."""
        if not hasattr(self, "broker"):
            return
        self._at(self.now_ms + 100_000)
        assert self.broker.lease_count() == self.broker.waiting() == 0
        assert all(view.kv_leased_tokens == view.backlog_tokens == 0 for view in self.broker.engines())
        queue = self.broker._state.queue
        assert not queue._lines
        assert not queue._of_key

    # ---- inside ----

    def _apply(self, event: Event) -> None:
        decisions = self.broker.apply(event)
        assert self.twin.apply(event) == decisions, "10: the order of engines does not matter"
        self.oracle.follow(event, decisions)

    def _at(self, now_ms: int) -> None:
        self.now_ms = now_ms
        self._apply(TimerFired(now_ms=Ms(now_ms)))

    def _configure(self, specs: list[EngineSpec]) -> None:
        events = [EngineConfigured(now_ms=Ms(self.now_ms), spec=each) for each in specs]
        for event in events:
            self.oracle.follow(event, self._without_grants(self.broker.apply(event)))
        for event in reversed(events):
            self.twin.apply(event)

    def _without_grants(self, decisions: list[Decision]) -> list[Decision]:
        assert decisions == [], "an engine that was never observed changes nothing for anyone"
        return decisions

    def _see(self, engine_id: EngineId, *, used: int = 0, again: bool = True) -> None:
        incarnation = self._incarnation(engine_id)
        if not again:
            self.prefilled[engine_id] = 0
            self.serial += 1
            incarnation = Incarnation(f"i{self.serial}")
        self._apply(
            observed(
                engine_id,
                self.now_ms,
                incarnation=incarnation,
                kv_capacity_tokens=Tokens(1_000),
                kv_used_tokens=Tokens(used),
                running=used // 400,
                prefill_tokens_total=Tokens(self.prefilled[engine_id]),
            )
        )

    def _scrape(self) -> None:
        for engine_id in sorted(self.oracle.engines):
            self._see(engine_id)

    def _incarnation(self, engine_id: EngineId) -> Incarnation:
        facts = self.oracle.engines.get(engine_id)
        return Incarnation("i1") if facts is None or facts.seen is None else facts.seen.incarnation

    def _pick(self, pick: int, *, live: bool = True) -> Lease:
        """A live lease if asked for and there is one, else any that ever was."""
        known = [lease for lease in self.oracle.first.values() if not live or lease.lease_id in self.oracle.ends]
        known = known or list(self.oracle.first.values())
        lease = known[pick % len(known)]
        return self.broker.lease(lease.lease_id) or lease


class PaperMachine(BrokerMachine):
    """Most leases migrate."""

    placement = PAPER


class DefaultMachine(BrokerMachine):
    """The score decides, and a watermark below the capacity."""

    placement = DEFAULT


class AffinityMachine(BrokerMachine):
    """No lease migrates."""

    placement = AFFINITY


# A failing history is shown as found: shrinking it would take longer than a test may.
for _machine in (PaperMachine, DefaultMachine, AffinityMachine):
    _machine.TestCase.settings = settings(
        max_examples=20, stateful_step_count=50, phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False
    )
TestPaper = PaperMachine.TestCase
TestDefault = DefaultMachine.TestCase
TestAffinity = AffinityMachine.TestCase

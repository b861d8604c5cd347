"""What every state machine of the broker needs: a fleet, settings, an oracle beside a broker and its twin, checks.

Rules are in the modules beside it: `machine_clients` and `machine_engines`; time and restarts are with the tests.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from conserve_sdk.core import (
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
    Lease,
    LeaseId,
    LeaseRequested,
    Ms,
    PlacementSettings,
    Ppm,
    PrefillerHosts,
    RequestId,
    Role,
    TimerFired,
    Tokens,
    TurnFinished,
)
from tests.core.oracle import Oracle
from tests.core.world import key, observed, spec, superseding

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
"""Any preset with any of its switches turned: the rules are independent of each other."""


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


class MachineBase(RuleBasedStateMachine):
    """Applies events to a broker, to its twin and to the oracle; has no rules of its own."""

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

    # ---- events ----

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

    def _end(self, lease: Lease, context: int, **changes: Any) -> None:
        values: dict[str, Any] = {
            "now_ms": Ms(self.now_ms),
            "lease_id": lease.lease_id,
            "context_tokens": Tokens(context),
            "prompt_tokens": Tokens(context),
            "prompt_bytes": 0,
            "cached_tokens": Tokens(context // 3),
            "prefill_ms": Ms(0),
            "prefill_engine_id": None,
            "migrated": False,
        }
        self._apply(TurnFinished(**{**values, **changes}))

    def _supersede(self, lease: Lease, tokens: int, **changes: Any) -> None:
        self.serial += 1
        self._apply(superseding(lease, tokens, serial=self.serial, now_ms=self.now_ms, **changes))

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

    # ---- time, engines, leases ----

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

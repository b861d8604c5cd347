"""Everything that engines and operators can do to a broker, as rules of its state machine."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from conserve_sdk.core import EngineDrained, EngineId, EngineUnreachable, LeaseRenewed, Ms
from tests.core.machine import CHOICE, ENGINES, FLEET, MachineBase


class EngineRules(MachineBase):
    """Engines are seen, fail, restart, drain, go and come back."""

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

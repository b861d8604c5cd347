"""What a fleet's figures call for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conserve_sdk.core import (
    DEFAULT,
    PAPER,
    Advice,
    BrokerSettings,
    EngineId,
    EngineState,
    EngineView,
    GrantFigures,
    ModelName,
    Ms,
    Role,
    Tokens,
)
from conserve_sdk.core.advice import advise
from tests.core.world import World, spec

MODEL = ModelName("m")
SEEN = GrantFigures(grants=100, wait_p95_ms=Ms(0), first_turn_p50_tokens=Tokens(4_000))


def engine(engine_id: str, share: float, *, role: Role = Role.DECODER, active: int = 0, **changes: Any) -> EngineView:
    values: dict[str, Any] = {
        "spec": spec(engine_id, role),
        "state": EngineState.READY,
        "kv_capacity_tokens": Tokens(100_000),
        "kv_active_tokens": Tokens(active),
        "prefill_share_ppm": round(share * 1_000_000),
    }
    return EngineView(**{**values, **changes})


def fleet(decoders: int, *, share: float = 0.0, active: int = 0, prefiller: float | None = None) -> list[EngineView]:
    hosts = [engine(f"d{index}", share, active=active) for index in range(decoders)]
    return hosts if prefiller is None else [*hosts, engine("p0", prefiller, role=Role.PREFILLER)]


def advice(engines: list[EngineView], *, grants: GrantFigures = SEEN, waiting: int = 0, **changes: Any) -> Advice:
    options = {"placement": DEFAULT, **changes}
    return advise(MODEL, engines, grants=grants, waiting=waiting, **options)


def codes(found: Advice) -> list[str]:
    return [finding.code for finding in found.findings]


def test_a_fleet_that_is_divided_as_it_should_be() -> None:
    found = advice(fleet(3, prefiller=0.6))
    assert (found.preset, found.prefillers, found.decoders, found.sure) == ("default", 1, 3, True)
    assert codes(found) == []
    assert (found.engines_ready, found.prefillers_now, found.prefill_work_ppm) == (4, 1, 600_000)


@pytest.mark.parametrize(("work", "prefillers"), [(0.7, 1), (0.72, 2), (1.4, 2), (6.0, 7)])
def test_prefillers_are_filled_to_seven_tenths_and_one_decoder_stays(work: float, prefillers: int) -> None:
    found = advice(fleet(8, share=work / 8))
    assert (found.prefillers, found.decoders) == (prefillers, 8 - prefillers)
    assert codes(found) == ["ratio"]
    said = f"0 of the engines are prefillers; the work seen calls for {prefillers}, {prefillers} more."
    assert found.findings[0].text == said


def test_too_many_prefillers_are_said_to_be() -> None:
    engines = [*fleet(6), *(engine(f"p{index}", 0.3, role=Role.PREFILLER) for index in range(2))]
    found = advice(engines)
    assert (found.prefillers, codes(found)) == (1, ["ratio"])
    assert "1 fewer" in found.findings[0].text


@pytest.mark.parametrize(("active", "saturated"), [(79_999, False), (80_000, True)])
def test_few_saturated_engines_should_not_disaggregate(active: int, saturated: bool) -> None:
    found = advice(fleet(3, active=active, prefiller=0.6))
    assert ("kv_saturated" in codes(found)) is saturated
    assert (found.preset, found.prefillers, found.decoders) == (("affinity", 0, 4) if saturated else ("default", 1, 3))


def test_many_saturated_engines_may() -> None:
    assert advice(fleet(5, active=99_000, prefiller=0.6)).prefillers == 1


@pytest.mark.parametrize(("share", "idle"), [(0.399_999, True), (0.4, False)])
def test_a_prefiller_that_would_be_idle_is_not_worth_a_quarter_of_the_fleet(share: float, idle: bool) -> None:
    found = advice(fleet(3, prefiller=share))
    assert ("idle_prefill" in codes(found), found.prefillers) == (idle, 0 if idle else 1)


@pytest.mark.parametrize(("tokens", "tiny"), [(2_047, True), (2_048, False)])
def test_tiny_first_turns_need_no_prefiller(tokens: int, tiny: bool) -> None:
    found = advice(fleet(7, prefiller=0.6), grants=replace(SEEN, first_turn_p50_tokens=Tokens(tokens)))
    assert ("tiny_first_turns" in codes(found), found.prefillers) == (tiny, 0 if tiny else 1)
    assert not tiny or "fewer than 2048 uncached tokens" in found.findings[0].text


def test_one_engine_is_not_divided_and_none_is_no_fleet() -> None:
    one = advice(fleet(1, share=0.9))
    assert (one.preset, one.prefillers, one.decoders, codes(one)) == ("affinity", 0, 1, ["one_engine"])
    assert codes(advice(fleet(1, share=0.1, active=90_000))) == ["one_engine"], "whatever else is true of it"
    gone = advice([engine("d0", 0.0, state=EngineState.GONE)])
    assert (gone.engines_ready, gone.kv_active_ppm, gone.sure, codes(gone)) == (0, 0, False, ["no_engine"])


@pytest.mark.parametrize(("grants", "sure"), [(31, False), (32, True)])
def test_few_grants_are_not_enough_to_be_sure(grants: int, sure: bool) -> None:
    few = replace(SEEN, grants=grants, first_turn_p50_tokens=Tokens(0))
    found = advice(fleet(3, prefiller=0.6), grants=few)
    assert found.sure is sure
    assert ("few_grants" in codes(found), "tiny_first_turns" in codes(found)) == (not sure, sure)


@pytest.mark.parametrize(("wait_ms", "long"), [(9_999, False), (10_000, True)])
def test_long_waits_are_a_finding(wait_ms: int, long: bool) -> None:
    found = advice(fleet(3, prefiller=0.6), grants=replace(SEEN, wait_p95_ms=Ms(wait_ms)), waiting=7)
    assert ("long_waits" in codes(found)) is long
    assert not long or "10.0 s" in found.findings[0].text


def test_idle_prefillers_may_host_where_the_preset_does_not_let_them() -> None:
    engines = [*fleet(6, share=0.05), engine("p0", 0.4, role=Role.PREFILLER)]
    assert codes(advice(engines, placement=PAPER)) == ["prefiller_idle"]
    assert codes(advice(engines)) == []


def test_lost_caches_and_idle_leases_call_for_a_host_tier() -> None:
    full = [engine(f"d{index}", 0.1, active=90_000, leases=10, busy=2, lost_caches=index) for index in range(6)]
    found = advice(full)
    assert {"caches_lost", "idle_leases"} <= set(codes(found))
    texts = {finding.code: finding.text for finding in found.findings}
    assert "d1 (1)" in texts["caches_lost"]
    assert "d0 (" not in texts["caches_lost"]
    assert "48 of 60 leases" in texts["idle_leases"]
    tiered = [replace(view, spec=replace(view.spec, host_tier_tokens=Tokens(1))) for view in full]
    assert "idle_leases" not in codes(advice(tiered))


@pytest.mark.parametrize(("busy", "idle"), [(4, True), (5, False)])
def test_leases_are_idle_when_fewer_than_half_are_in_a_turn(busy: int, idle: bool) -> None:
    found = advice([engine(f"d{index}", 0.1, active=80_000, leases=10, busy=busy) for index in range(6)])
    assert ("idle_leases" in codes(found)) is idle


def test_the_broker_advises_on_each_model_it_has() -> None:
    here = World(
        settings=BrokerSettings(placement=PAPER),
        fleet=[spec("d0"), spec("p0", Role.PREFILLER), spec("x0", model=ModelName("other"))],
    )
    here.grant("c", 30_000, hint=EngineId("d0"))
    here.grant("c2", 30_000)
    here.grant("c3", 30_000)
    here.request("waits", 30_000, wait_ms=9_000)
    first, second = here.broker.advice()
    assert (first.model, first.waiting, first.grants.grants, first.engines_ready) == ("m", 1, 3, 2)
    assert first.kv_active_ppm == 900_000
    assert (second.model, second.waiting, second.grants.grants) == ("other", 0, 0)

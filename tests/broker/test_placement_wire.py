"""Re-lease, appends, parents, preambles and advice as a client sees them, and the switches in the configuration."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from conserve_broker.metrics import BrokerMetrics
from conserve_broker.settings import BrokerConfig
from conserve_sdk.core import AFFINITY, DEFAULT, PAPER, BrokerSettings, PlacementSettings, PrefillerHosts
from conserve_sdk.core.units import MILLION
from conserve_sdk.protocol import AdviceInfo, EngineInfo, LeaseGrant
from conserve_sdk.testing import InMemoryBroker, small_fleet
from tests.broker.test_desk import Client, problem, turn


def running(placement: PlacementSettings, **changes: Any) -> tuple[InMemoryBroker, Client]:
    broker = InMemoryBroker(engines=small_fleet(decoders=2), settings=BrokerSettings(placement=placement, **changes))
    return broker, Client(broker)


def grant_of(response: Any) -> LeaseGrant:
    assert response.is_success, response.text
    return LeaseGrant.model_validate_json(response.content)


class TestReLease:
    def test_a_report_tells_and_a_supersede_follows(self) -> None:
        _, client = running(AFFINITY)
        grant = client.grant()
        (status,) = client.report(turn(grant))
        assert (status.directive, status.directive_reason) == ("none", "")
        client.http.post(f"/v1/engines/{grant.decoder.engine_id}/drain")
        (status,) = client.renew(grant.token)
        assert (status.verdict, status.directive, status.directive_reason) == ("ok", "re_lease", "draining")
        moved = grant_of(client.supersede(grant, cause="re_lease", cached_tokens=4_000, first_turn_input_tokens=4_500))
        assert (moved.mode, moved.prefiller, moved.supersedes) == ("migrate", grant.decoder, grant.lease_id)
        assert moved.decoder.engine_id != grant.decoder.engine_id
        assert moved.decision.rule == "re_lease_draining"

    def test_a_move_that_is_not_worth_it_any_more_is_answered_with_the_live_lease(self) -> None:
        _, client = running(AFFINITY)
        grant = client.grant()
        response = client.supersede(grant, cause="re_lease", first_turn_input_tokens=4_500)
        assert response.status_code == 200
        stayed = grant_of(response)
        assert (stayed.lease_id, stayed.reused, stayed.epoch) == (grant.lease_id, True, 1)


class TestAppends:
    def test_an_append_that_the_decoder_takes_stays(self) -> None:
        _, client = running(DEFAULT)
        grant = client.grant()
        client.report(turn(grant))
        stayed = grant_of(client.supersede(grant, cause="append", cached_tokens=4_000, first_turn_input_tokens=4_100))
        assert stayed.reused

    def test_the_threshold_stands_in_the_grant_of_presets_that_move_appends(self) -> None:
        assert running(PAPER)[1].grant().append_threshold_tokens == 0
        assert running(DEFAULT)[1].grant().append_threshold_tokens > 0


def test_a_parent_and_a_preamble_are_taken() -> None:
    _, client = running(AFFINITY)
    client.grant("other")
    parent = client.grant("parent")
    child = client.grant("child", parent_lease_id=parent.lease_id, prefix_key="sha256:1")
    assert (child.decoder.engine_id, child.decision.rule) == (parent.decoder.engine_id, "parent")


def test_a_tenants_quota_is_a_problem_of_its_own() -> None:
    _, client = running(AFFINITY, leased_tokens_per_tenant_max=7_000)
    client.grant("a")
    found = problem(client.ask("b"))
    assert (found.status, found.code) == (429, "over_quota")
    assert found.retry_after_ms == 1_000


def test_an_engine_shows_what_was_learned_of_it() -> None:
    _, client = running(AFFINITY)
    grant = client.grant()
    info = EngineInfo.model_validate_json(client.http.get(f"/v1/engines/{grant.decoder.engine_id}").content)
    assert (info.kv_active_tokens, info.prefill_share_ppm, info.lost_caches) == (4_000, 0, 0)


def test_advice_is_given() -> None:
    _, client = running(AFFINITY)
    client.grant()
    found = AdviceInfo.model_validate_json(client.http.get("/v1/advice").content)
    (model,) = found.models
    assert (found.preset, model.model, model.grants, model.sure) == ("affinity", "test-model", 1, False)
    assert "few_grants" in [finding.code for finding in model.findings]


def test_rules_are_counted_on_the_metrics_page() -> None:
    broker, client = running(AFFINITY)
    metrics = BrokerMetrics()
    metrics.watch(broker.core, clock=broker.clock)  # type: ignore[arg-type]  # a clock with a `now_ms()` is enough
    grant = client.grant()
    client.http.post(f"/v1/engines/{grant.decoder.engine_id}/drain")
    client.renew(grant.token)
    client.supersede(grant, cause="re_lease", cached_tokens=4_000, first_turn_input_tokens=4_500)
    page = metrics.page().decode()
    for line in (
        'conserve_placement_decoder_rules_total{rule="most_free_kv"} 1.0',
        'conserve_placement_decoder_rules_total{rule="re_lease_draining"} 1.0',
        'conserve_placement_prefill_rules_total{rule="old_decoder"} 1.0',
        'conserve_re_lease_directives_total{reason="draining"} 1.0',
        'conserve_re_lease_moves_total{reason="draining"} 1.0',
        'conserve_re_lease_moves_total{reason="load"} 0.0',
        'conserve_move_stays_total{cause="append"} 0.0',
        "conserve_re_lease_withdrawn_total 0.0",
        "conserve_lost_caches_total 0.0",
    ):
        assert line in page
    for name in ("decoder_kv_active_tokens", "engine_prefill_share_ratio", "engine_lost_caches"):
        assert f'conserve_{name}{{engine_id="{grant.decoder.engine_id}"}}' in page


class TestSwitches:
    """Every switch of the core can be set in `[placement]`."""

    def test_every_constant_of_the_core_has_its_key(self) -> None:
        keys = set(type(BrokerConfig().placement).model_fields)
        for each in fields(PlacementSettings):
            assert each.name.removesuffix("_ppm") in keys | {"name", "prefill_choice"}

    def test_switches_and_constants_reach_the_core(self) -> None:
        placement = {
            "idle_aware": False,
            "idle_after_ms": 2_000,
            "oversubscription": 2.5,
            "leased_weight": 0.5,
            "prefiller_hosts": "never",
            "host_gate": 0.3,
            "host_reserve": 0.2,
            "host_base_load": 0.1,
            "host_share_weight": 0.4,
            "prefill_share_window_ms": 10_000,
            "move_appends": False,
            "re_lease": False,
            "move_threshold": 0.4,
            "move_release": 0.1,
            "move_idle_ms": 60,
            "move_rest_ms": 70,
        }
        found = BrokerConfig.from_mapping({"placement": placement}).core_settings().placement
        for key, value in placement.items():
            if key == "prefiller_hosts":
                assert found.prefiller_hosts is PrefillerHosts.NEVER
            elif hasattr(found, key):
                assert getattr(found, key) == value
            else:
                assert getattr(found, f"{key}_ppm") == value * MILLION  # type: ignore[operator]  # numbers, all of them

    def test_tier_and_quota_reach_the_core(self) -> None:
        engine = {"id": "d0", "url": "http://d0:8000", "role": "decoder", "model": "m", "host_tier_tokens": 500_000}
        config = BrokerConfig.from_mapping({"engine": [engine], "admission": {"leased_tokens_per_tenant_max": 9}})
        assert config.engine_configs()[0].host_tier_tokens == 500_000
        assert config.core_settings().leased_tokens_per_tenant_max == 9

    @pytest.mark.parametrize(
        ("placement", "start"),
        [
            ({"move_release": 0.4}, "placement.move_release: above placement.move_threshold"),
            ({"preset": "affinity", "idle_aware": False}, "engine.host_tier_tokens: preset 'affinity' does not use"),
        ],
    )
    def test_what_does_not_go_together_is_said(self, placement: dict[str, Any], start: str) -> None:
        engine = {"id": "d0", "url": "http://d0:8000", "role": "decoder", "model": "m", "host_tier_tokens": 500_000}
        config = BrokerConfig.from_mapping(
            {"engine": [engine], "placement": placement, "journal": {"path": "leases.db"}}
        )
        (warning,) = config.warnings()
        assert warning.startswith(start)

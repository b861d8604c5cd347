"""Turns as Prometheus metrics: names, labels, sums; several hooks of one registry."""

import builtins
import pickle

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from conserve_sdk import ConfigError, PrometheusHook, TurnRecord
from conserve_sdk.testing import EngineReply, ScriptedEngine


def record(**fields) -> TurnRecord:
    return TurnRecord(**{"conversation_id": "c", "lineage": "l", "model": "m", **fields})


def test_a_conversation_in_numbers(make_world) -> None:
    registry = CollectorRegistry()
    engine = ScriptedEngine(EngineReply.prefill(params=None), then="answer")
    world = make_world(engine=engine, on_turn=PrometheusHook(registry))
    world.turn()
    world.turn(conversation_id="c2", stream=True)

    def value(name, **labels):
        return registry.get_sample_value(f"conserve_sdk_{name}", {"model": "test-model", **labels})

    assert value("turns_total", mode="migrate", outcome="ok") == 2
    assert value("losses_total", loss="no_transfer_params") == 1
    assert value("migrations_total") == 1
    assert value("failovers_total") == 0
    assert value("engine_requests_total") == len(engine.calls) == 4
    assert value("prompt_tokens_total") == 200
    assert value("completion_tokens_total") == 7
    assert value("ttft_seconds_count", mode="migrate") == 2
    assert value("turn_duration_seconds_count", mode="migrate") == 2
    assert value("ttfet_seconds_count") == 2
    assert value("prefill_seconds_count") == 2
    assert value("lease_wait_seconds_count") == 2
    assert value("tbt_seconds_count") == 1


def test_failures_and_units() -> None:
    registry = CollectorRegistry()
    hook = PrometheusHook(registry)
    hook(record(error="http_503", duration_ms=1500))
    hook(record(mode="local", tbt_us=(20_000, 40_000), cached_tokens=7, failovers=1, ttft_ms=250))
    get = registry.get_sample_value
    assert get("conserve_sdk_turns_total", {"model": "m", "mode": "none", "outcome": "http_503"}) == 1
    assert get("conserve_sdk_turn_duration_seconds_sum", {"model": "m", "mode": "none"}) == 1.5
    assert get("conserve_sdk_tbt_seconds_sum", {"model": "m"}) == pytest.approx(0.06)
    assert get("conserve_sdk_ttft_seconds_sum", {"model": "m", "mode": "local"}) == 0.25
    assert get("conserve_sdk_cached_prompt_tokens_total", {"model": "m"}) == 7
    assert get("conserve_sdk_failovers_total", {"model": "m"}) == 1
    assert get("conserve_sdk_lease_wait_seconds_count", {"model": "m"}) is None
    page = generate_latest(registry).decode()
    names = {family.name for family in text_string_to_metric_families(page)}
    assert all(name.startswith("conserve_sdk_") for name in names)


def test_hooks_of_one_registry_add_up() -> None:
    registry = CollectorRegistry()
    for _ in range(3):
        PrometheusHook(registry)(record())
    labels = {"model": "m", "mode": "none", "outcome": "ok"}
    assert registry.get_sample_value("conserve_sdk_turns_total", labels) == 3


def test_pickle() -> None:
    assert isinstance(pickle.loads(pickle.dumps(PrometheusHook())), PrometheusHook)
    with pytest.raises(TypeError, match="global"):
        pickle.dumps(PrometheusHook(CollectorRegistry()))


def test_without_the_library_it_names_the_extra(monkeypatch) -> None:
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("prometheus_client"):
            raise ModuleNotFoundError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"conserve-sdk\[prometheus\]"):
        PrometheusHook()

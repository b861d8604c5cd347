"""The path that the demo takes on real vLLM, here on emulated engines that stand in for its servers.

The suite in tests/vllm and `make demo-vllm` run the same path on real ones.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from conserve_lab.demo import run as run_module
from conserve_lab.demo.equality import Equality
from conserve_lab.demo.figures import Variant
from conserve_lab.demo.fleets import VllmSource
from conserve_lab.demo.run import judge, run_demo
from conserve_lab.demo.settings import DemoSettings, demo_settings
from conserve_lab.emulator import EmulatedFleet, fleet_of
from conserve_lab.stack import broker_entries


class StandIn:
    """The part of `VllmFleet` that the demo uses, with emulated engines in it."""

    model = "emulated"
    eos_token_id = 2

    def __init__(self, fleet: EmulatedFleet) -> None:
        self._fleet = fleet
        self.restarted: list[str] = []

    @property
    def engines(self) -> dict[str, Any]:
        return {engine.id: SimpleNamespace(url=engine.url) for engine in self._fleet.engines}

    def broker_engines(self) -> list[dict[str, Any]]:
        return [entry for entry in broker_entries(self._fleet) if entry["id"] != "a0"]

    def restart(self, engine_id: str) -> None:
        self.restarted.append(engine_id)
        self._fleet.restart(engine_id)


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    engines = [
        {"id": "p0", "role": "prefiller"},
        {"id": "d0", "role": "decoder"},
        {"id": "d1", "role": "decoder"},
        {"id": "a0", "role": "both", "connector": "none"},
    ]
    with EmulatedFleet(fleet_of(engines, defaults={"time_scale": 0})) as fleet:
        yield StandIn(fleet)


@pytest.mark.timeout(180)
def test_calls_are_scripted_counted_and_compared_with_the_reference(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def source(settings: DemoSettings, *, say: Any) -> Iterator[VllmSource]:
        yield VllmSource(stand_in)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "open_source", source)
    settings = demo_settings("vllm", conversations=2, plain=True, json_path=tmp_path / "out.json")
    settings = replace(settings, workload=replace(settings.workload, arrivals_s=0.0))
    out = io.StringIO()
    code = run_demo(settings, console=Console(file=out, width=120))
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert code == 0, out.getvalue()
    assert found["preset"] == "paper"
    assert found["migrations"] == found["leases_migrated"] == found["engine_transfers"] == 2
    assert found["engine_external_hit_tokens"] > 0
    assert found["greedy_equal_turns"] == found["greedy_compared_turns"] == found["turns"]
    assert "greedy answers equal to the aggregated server" in out.getvalue()
    assert stand_in.restarted == ["p0", "d0", "d1"] * 2, "cold caches for each of the two comparisons"


def test_affinity_lets_every_server_do_both(stand_in: StandIn) -> None:
    source = VllmSource(stand_in)  # type: ignore[arg-type]
    with source.fresh(Variant.CONSERVE) as fleet:
        assert fleet.description == "1 prefill, 2 decode"
        assert fleet.prefiller_ids == {"p0"}
        assert fleet.call_bias is not None
        assert fleet.call_bias["2"] == 100
        assert set(fleet.call_bias.values()) == {100, -100}
    with source.fresh(Variant.AFFINITY) as fleet:
        assert fleet.description == "3 do both"
        assert fleet.prefiller_ids == frozenset()


def _figures(**changes: Any) -> dict[str, Any]:
    return {
        "follow_up_turns_on_prefiller": 0, "leases_migrated": 2, "migrations_per_migrated_lease": 1.0,
        "follow_up_turns": 5, "follow_up_cached_token_share": 0.9, "error_details": [], "errors": 0,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"follow_up_turns_on_prefiller": 1}, "1 follow-up turns touched a prefiller"),
        ({"migrations_per_migrated_lease": 2.0}, "2.0 migrations per migrated lease instead of 1"),
        ({"follow_up_cached_token_share": 0.0}, "no follow-up turn hit its decoder's prefix cache"),
    ],
    ids=["prefiller", "migrations", "cache"],
)
def test_a_broken_promise_is_an_error_of_the_demo(changes: dict[str, Any], complaint: str) -> None:
    found = _figures(**changes)
    judge(found, None)
    assert found["errors"] == 1
    assert found["error_details"] == [complaint]


def test_an_answer_that_differs_is_an_error_of_the_demo() -> None:
    found = _figures()
    judge(found, Equality(equal=1, compared=2, unstable=0, differences=("t, message 3",)))
    assert found["error_details"] == ["answers differ: t, message 3"]


def test_nothing_wrong_is_no_error() -> None:
    found = _figures()
    judge(found, Equality(equal=2, compared=2, unstable=1, differences=()))
    assert found["errors"] == 0

"""The demo's figures come from what was observed, and its audit notices when two observers disagree."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conserve_lab.demo.agent import AgentRun
from conserve_lab.demo.counters import EngineCounters, parse_counters, total
from conserve_lab.demo.figures import Observation, Variant, audit, figures
from conserve_lab.demo.report import as_json, print_report, write_json
from conserve_lab.demo.tasks import Task
from conserve_lab.demo.view import Snapshot, render
from conserve_sdk.core.units import ConversationId, EngineId, LeaseId, LineageId
from conserve_sdk.protocol import EngineInfo, FleetInfo
from conserve_sdk.telemetry import TurnRecord

PAGE = """# HELP vllm:request_success_total Count
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 3.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 2.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 700.0
vllm:prompt_tokens_by_source_total{source="local_compute"} 100.0
vllm:prompt_tokens_by_source_total{source="local_cache_hit"} 200.0
vllm:prompt_tokens_by_source_total{source="external_kv_transfer"} 400.0
vllm:nixl_xfer_time_seconds_bucket{le="0.005"} 1.0
vllm:nixl_xfer_time_seconds_count{engine="0"} 2.0
vllm:external_prefix_cache_hits_total{engine="0"} 4e+02
vllm:generation_tokens_total 55.0
vllm:prompt_tokens_created 1.7e9
"""


def _record(turn: int, *, migrated: bool = False, **more: Any) -> TurnRecord:
    fields: dict[str, Any] = {
        "conversation_id": ConversationId("c"),
        "lineage": LineageId("l"),
        "lease_id": LeaseId("L1"),
        "turn": turn,
        "first_turn": turn == 1,
        "migrated": migrated,
        "prefill_engine_id": EngineId("p0") if migrated else None,
        "prompt_tokens": 100 * turn,
        "cached_tokens": 90 * turn,
        "ttft_ms": 10 * turn,
        "ttfet_ms": 500 if turn == 3 else None,
        "tbt_us": (20_000, 30_000),
    }
    return TurnRecord(**(fields | more))


def _seen(**changes: Any) -> Observation:
    task = Task(conversation_id="c", arrival_s=0.0, prompt="p", seed=1, turns=3)
    fields: dict[str, Any] = {
        "variant": Variant.CONSERVE,
        "engine": "emulated",
        "preset": "default",
        "runs": [AgentRun(task=task, turns=3)],
        "records": [_record(1, migrated=True), _record(2), _record(3)],
        "counters": {
            "p0": EngineCounters(requests=1, prompt_tokens=100, computed_tokens=100),
            "d0": EngineCounters(requests=3, prompt_tokens=600, received_tokens=96, transfers=1),
        },
        "prefiller_ids": frozenset({"p0"}),
        "broker_grants": 1,
        "broker_migrations": 1,
        "elapsed_s": 1.0,
    }
    return Observation(**(fields | changes))


def test_counters_are_read_under_vllms_names() -> None:
    counters = parse_counters(PAGE)
    assert counters == EngineCounters(
        requests=5,
        prompt_tokens=700,
        computed_tokens=100,
        cached_tokens=200,
        received_tokens=400,
        transfers=2,
        external_hit_tokens=400,
        generated_tokens=55,
    )
    assert total([counters, counters]) - counters == counters


def test_figures_of_a_clean_run() -> None:
    found = figures(_seen())
    assert found["errors"] == 0, found["error_details"]
    assert (found["leases_migrated"], found["migrations"], found["migrations_per_migrated_lease"]) == (1, 1, 1.0)
    assert (found["turns"], found["follow_up_turns"], found["follow_up_turns_on_prefiller"]) == (3, 2, 0)
    assert found["follow_up_cached_token_share"] == 0.9
    assert found["ttft_ms"] == {"p50": 20, "p95": 30}
    assert found["ttfet_ms"] == {"p50": 500, "p95": 500}
    assert found["tbt_ms"] == {"p50": 20.0, "p95": 30.0, "p99": 30.0}


def test_migrations_are_the_engines_count_not_the_sdks() -> None:
    twice = dict(_seen().counters) | {"d0": EngineCounters(requests=3, prompt_tokens=600, transfers=2)}
    found = figures(_seen(counters=twice))
    assert found["migrations"] == 2
    assert found["migrations_per_migrated_lease"] == 2.0
    assert found["error_details"] == ["migrations: the SDK saw 1, the engines 2"]


def test_a_follow_up_on_a_prefiller_is_seen_in_the_prefillers_own_counter() -> None:
    counters = dict(_seen().counters) | {"p0": EngineCounters(requests=2)}
    found = figures(_seen(counters=counters))
    assert found["follow_up_turns_on_prefiller"] == 1
    assert found["errors"] == 1


def _moved(by: str) -> list[TurnRecord]:
    """Turn 2 opened a second lease, with its prefill by the named engine."""
    again: dict[str, Any] = {"lease_id": LeaseId("L2"), "migrated": True, "prefill_engine_id": EngineId(by)}
    return [_record(1, migrated=True), _record(2, **again), _record(3, lease_id=LeaseId("L2"))]


def test_a_conversation_that_moved_by_a_new_lease_is_no_follow_up_on_a_prefiller() -> None:
    counters = {
        "p0": EngineCounters(requests=2, prompt_tokens=300),
        "d0": EngineCounters(requests=1, prompt_tokens=100, transfers=1),
        "d1": EngineCounters(requests=2, prompt_tokens=500, transfers=1),
    }
    found = figures(_seen(records=_moved("p0"), counters=counters, broker_grants=2, broker_migrations=2))
    assert found["error_details"] == []
    assert (found["re_leases"], found["follow_up_turns_on_prefiller"]) == (1, 0)
    assert (found["leases_migrated"], found["migrations_per_migrated_lease"]) == (2, 1.0)


def test_a_decoder_may_prefill_for_the_decoder_that_its_conversation_moves_to() -> None:
    counters = {
        "p0": EngineCounters(requests=1, prompt_tokens=100),
        "d0": EngineCounters(requests=2, prompt_tokens=300, transfers=1),
        "d1": EngineCounters(requests=2, prompt_tokens=500, transfers=1),
    }
    found = figures(_seen(records=_moved("d0"), counters=counters, broker_grants=2, broker_migrations=2))
    assert found["error_details"] == []
    assert (found["re_leases"], found["follow_up_turns_on_prefiller"]) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {
                "records": [_record(1, migrated=True), _record(2, prefill_engine_id=EngineId("p0")), _record(3)],
                "counters": dict(_seen().counters) | {"p0": EngineCounters(requests=2)},
            },
            "opened by a prefill: 1 of 2",
        ),
        ({"records": [_record(1, migrated=True), _record(2)]}, "turns: agents saw 3, the SDK 2"),
        ({"records": [_record(1, migrated=True), _record(2), _record(3, prompt_tokens=1)]}, "prompt tokens"),
        ({"records": [_record(1, migrated=True), _record(2), _record(3, error="stream_dropped")]}, "stream_dropped"),
        ({"records": [_record(1, migrated=True), _record(2), _record(3, loss="prefill_failed")]}, "prefill_failed"),
        ({"records": [_record(1, migrated=True), _record(2, migrated=True), _record(3)]}, "lease L1 moved 2 times"),
    ],
)
def test_disagreement_is_an_error(changes: dict[str, Any], complaint: str) -> None:
    assert any(complaint in problem for problem in audit(_seen(**changes)))


def test_broker_that_counted_otherwise_is_an_error() -> None:
    assert audit(_seen(broker_migrations=0)) == ["migrations: the SDK saw 1, the broker 0"]


def test_an_agents_failure_is_reported_and_counted() -> None:
    seen = _seen()
    failed = dataclasses.replace(seen.runs[0], error="c: APIConnectionError: gone")
    assert figures(_seen(runs=[failed]))["error_details"] == ["c: APIConnectionError: gone"]


def test_report_shows_the_runs_beside_each_other_and_json_nests_them(tmp_path: Path) -> None:
    by_variant = {"conserve": figures(_seen()), "affinity": figures(_seen(variant=Variant.AFFINITY))}
    out = io.StringIO()
    print_report(
        Console(file=out, width=120), by_variant, engine_counts={"conserve": "1 prefiller + 1 decoder", "affinity": "2"}
    )
    assert "migrations per migrated lease" in out.getvalue()
    assert "1 prefiller + 1 decoder" in out.getvalue()
    document = as_json(by_variant, seed=1)
    write_json(tmp_path / "out.json", document)
    read = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert read["migrations_per_migrated_lease"] == 1.0
    assert read["affinity"]["turns"] == 3
    assert read["seed"] == 1


def test_errors_are_printed_with_their_run() -> None:
    out = io.StringIO()
    broken = figures(_seen(records=[_record(1, error="boom [/x]")]))
    print_report(Console(file=out, width=120), {"conserve": broken}, engine_counts={"conserve": "2"})
    assert "error (ConServe): turn 1 of c: boom [/x]" in out.getvalue()


def test_view_draws_engines_with_their_occupancy() -> None:
    engine = EngineInfo.model_validate(
        {
            "engine_id": "d0", "url": "http://x", "role": "decoder", "model": "m", "state": "ready", "detail": "",
            "incarnation": "i", "transfer_group": "g", "kv_capacity_tokens": 1000, "kv_used_tokens": 250,
            "kv_leased_tokens": 500, "leases": 3, "running": 2, "waiting": 0, "backlog_tokens": 0,
            "prefill_rate_tokens_per_s": 1, "observed_ago_ms": 5, "block_size_tokens": 16,
            "max_model_len_tokens": 100,
        }
    )  # fmt: skip
    fleet = FleetInfo(
        preset="default", engines=(engine,), leases=3, waiting_requests=0, migrations_total=1, grants_total=1
    )
    out = io.StringIO()
    snapshot = Snapshot(title="ConServe", conversations=24, finished=6, turns=40, migrations=20, fleet=fleet)
    Console(file=out, width=120).print(render(snapshot))
    assert "d0" in out.getvalue()
    assert "25%" in out.getvalue()
    assert "6/24" in out.getvalue()
    Console(file=out, width=120).print(render(dataclasses.replace(snapshot, fleet=None)))

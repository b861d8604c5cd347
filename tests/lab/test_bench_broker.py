"""`conserve bench broker` and `conserve bench soak`, small: that they measure and check all they say."""

from __future__ import annotations

import json

import pytest

from conserve_lab.bench.load_client import percentiles
from conserve_lab.bench.page_servers import page
from conserve_lab.bench.soaked_agents import RightAnswers
from conserve_lab.cli import bench_main
from conserve_lab.emulator import default_fleet
from conserve_lab.failover import measure_failover, store_binary

KEYS = {
    "grants_per_s",
    "grant_cpu_us",
    "server_ceiling_per_s",
    "grant_p99_ms_at_half_load",
    "server_p99_ms_at_half_load",
    "renewal_cpu_us",
    "report_cpu_us",
    "recovery_s_100k",
    "bytes_per_lease",
    "failover_s_kill9",
    "failover_s_planned",
    "acked_lost",
    "scrape_cpu_share_64",
}
SOAK_KEYS = {"conversations", "lost", "wrong", "leaked", "errors_seen_by_agents", "timeline"}


def test_all_figures_of_the_broker_are_there(tmp_path, capsys) -> None:
    target = tmp_path / "broker.json"
    argv = ["broker", "--json", str(target), "--slices", "1", "--slice-s", "0.3", "--leases", "600"]
    assert bench_main([*argv, "--connections", "4", "--scrape-s", "0.3", "--failovers", "0"]) == 0
    found = json.loads(target.read_text())
    assert found.keys() >= KEYS | {"goals", "load", "spread"}
    assert found["recovery_100k"]["leases"] == 600
    assert (found["renewal_batch"]["n"], found["renewal_batch"]["size"]) == (2, 500)
    assert (found["report_batch"]["n"], found["report_batch"]["size"]) == (2, 50)
    assert found["grant_at_half_load"]["n"] > 0
    assert found["server_ceiling_per_s"] > 0
    assert found["failover"] == "not asked for" or "is installed" in found["failover"]
    assert "renewal_cpu_us" in capsys.readouterr().out


@pytest.mark.skipif(store_binary() is None, reason="needs valkey-server or redis-server")
def test_leaders_are_replaced_among_leases_that_others_hold() -> None:
    ticks = []
    found = measure_failover(store_binary(), rounds=1, lock_ttl_ms=3_000, leases=300, tick=lambda: ticks.append(1))
    assert (len(found.killed_ms), len(found.planned_ms), len(ticks)) == (1, 1, 2)
    assert (found.acked > 0, found.acked_lost) == (True, 0)


@pytest.mark.skipif(store_binary() is None, reason="needs valkey-server or redis-server")
def test_nothing_is_lost_wrong_or_leaked_in_a_small_soak(tmp_path, capsys) -> None:
    target = tmp_path / "soak.json"
    argv = ["soak", "--json", str(target), "--minutes", "0.15", "--agents", "4", "--think-s", "0.2"]
    assert bench_main([*argv, "--engine-fault-s", "2", "--leader-kills", "1"]) == 0
    found = json.loads(target.read_text())
    assert found.keys() >= SOAK_KEYS
    assert (found["lost"], found["wrong"], found["leaked"]) == (0, 0, 0)
    assert found["conversations"] >= 4, "every agent ended at least the one it had begun"
    happened = [each["what"] for each in found["timeline"]]
    assert any(what.startswith("leading broker") for what in happened)
    assert any(what.startswith("engine") for what in happened)
    assert "errors_seen_by_agents" in capsys.readouterr().out


def test_a_soak_without_a_store_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setattr("conserve_lab.bench.soak.store_binary", lambda: None)
    assert bench_main(["soak"]) == 1
    assert capsys.readouterr().err == (
        "conserve bench soak: neither valkey-server nor redis-server is installed: apt-get install redis-server\n"
    )


def test_the_right_answer_depends_on_every_word() -> None:
    right = RightAnswers(default_fleet(prefillers=0, decoders=1, tool_calls_min=0, tool_calls_max=0).engine[0])
    body = {"model": "emulated", "messages": [{"role": "user", "content": "one"}], "max_tokens": 32}
    other = {**body, "messages": [{"role": "user", "content": "two"}]}
    assert right.to(body) == right.to(body) != right.to(other)
    assert right.to(body)


def test_percentiles_are_values_that_were_taken() -> None:
    found = percentiles([float(each) for each in range(1, 1_001)])
    assert found == {"p50_ms": 501.0, "p99_ms": 991.0, "p999_ms": 1_000.0, "n": 1_000}
    assert percentiles([])["n"] == 0


def test_a_page_is_as_long_as_a_real_one() -> None:
    lines = page(lines=750, started_at_s=1.0).splitlines()
    assert 750 <= len(lines) < 775
    assert 55_000 < len(page(lines=750, started_at_s=1.0)) < 80_000

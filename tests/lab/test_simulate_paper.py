"""`conserve simulate paper`: rows and headlines under both accountings, beside what was published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conserve_lab.cli import simulate_main
from conserve_lab.simulator import paper
from conserve_lab.simulator.paper_command import verdicts
from conserve_lab.simulator.published import HEADLINE


def test_the_experiment_runs_and_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper, "CONVERSATIONS", 8)  # forked workers inherit it
    monkeypatch.setattr(paper, "LOADS", (1.0, paper.SATURATION))
    path, figure = tmp_path / "paper.json", tmp_path / "paper.svg"
    given = ["--seeds", "1", "--processes", "2", "--json", str(path), "--figure", str(figure)]
    assert simulate_main(["paper", *given]) == 0
    found = json.loads(path.read_text())
    assert set(found) == {"artifact", "arrival"}
    for accounting in found.values():
        assert set(HEADLINE) < set(accounting["headline"])
        assert {row["system"] for row in accounting["rows"]} == set(paper.SYSTEMS)
        assert {row["decoder_w"] for row in accounting["rows"]} == {200, 300}
    pairs = zip(found["artifact"]["rows"], found["arrival"]["rows"], strict=True)
    assert all(artifact["ttfet_p95_norm"] <= arrival["ttfet_p95_norm"] for artifact, arrival in pairs)
    assert figure.stat().st_size > 10_000
    assert capsys.readouterr().out.count("reproduce") == len(HEADLINE)


def test_a_verdict_names_the_accounting_under_which_a_headline_comes_out() -> None:
    def headline(value: float) -> dict[str, Any]:
        return {"headline": dict.fromkeys(HEADLINE, value)}

    lines = verdicts({"artifact": headline(HEADLINE["ttfet_p95_reduction_pct"] + 1), "arrival": headline(-300.0)})
    assert lines[0].endswith("reproduces (artifact)")
    assert lines[1].endswith("does not reproduce under either accounting")


def test_published_values_stand_beside_ours_with_the_error() -> None:
    run = paper.PaperRun(system="collocated", per_s=1.0, seed=1, workload="swe-padded")
    figures = {
        "ttfet_p95_norm": 2.64,
        "tbt_p95_norm": 2.4,
        "e2e_p95_norm": 2.0,
        "tokens_per_joule": 60.0,
        "ttfet_gmean_norm": 2.0,
        "tbt_p99_ms": 140.0,
        "slo_violations": 0.0,
    }
    row = paper._row("arrival", (run.system, run.per_s, False), figures)
    assert row["ttfet_p95_norm_published"] == 2.4
    assert row["ttfet_p95_norm_error_pct"] == 10.0
    assert row["e2e_p95_norm_published"] is None

"""The report: losses first, nothing from elsewhere, and verdicts that one can check by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest

from conserve_lab.simulator.fronts import front
from conserve_lab.simulator.report import compare_report
from conserve_lab.simulator.verdicts import goals, verdicts


def row(policy: str, ttfet: float, p99: float | None, p999: float, **changes: Any) -> dict[str, Any]:
    settings = {"engine": "a40/qwen3-0.6b", "engines": 4, "seeds": 2, "conversations": 9, "saturation": 0.5}
    return {
        "workload": "w",
        "load": 1.0,
        "policy": policy,
        "settings": settings | changes.pop("settings", {}),
        "ttfet_p95_norm": ttfet,
        "tbt_p99_ms": p99,
        "tbt_p999_ms": p999,
        "joules_per_output_token": 1.5,
        "queue_wait_p95_ms": 0.0,
        "reprefilled_tokens": 12_345,
        "moved_tokens": 0,
        **changes,
    }


def test_only_a_reference_that_is_nowhere_worse_dominates() -> None:
    rows = [
        row("default", 1.5, 30, 40),
        row("a2", 1.5, 30, 40),
        row("a0@512", 1.4, 31, 39),
        row("a0-host", 1.4, 29, 39),
        row("round-robin", 1.0, 1, 1),
        row("paper", 1.6, 40, 50),
    ]
    (found,) = verdicts(rows)
    assert found.dominated_by == ("a2", "a0-host"), "a tie is a loss, and others are no references"
    assert not found.worse_than_published
    assert not found.full
    assert [(held, of) for _, held, of in goals([found])] == [(0, 1), (1, 1), (0, 1), (1, 1)]


def test_goals_below_saturation_leave_full_fleets_out() -> None:
    rows = [
        row("default", 1.06, 10, 10),
        row("a2", 1.0, 12, 12),
        row("default", 9.0, 10, 10, load=4.0, queue_wait_p95_ms=10_000.0),
        row("a2", 1.0, 12, 12, load=4.0),
        row("default", 9.0, 10, 10, load=8.0, settings={"saturation": 1.0}),
        row("a2", 1.0, 12, 12, load=8.0),
        row("a0", 1.0, 1, 1, load=9.0),
    ]
    found = verdicts(rows)
    assert [verdict.full for verdict in found] == [False, True, True]
    assert [(held, of) for _, held, of in goals(found)] == [(3, 3), (0, 1), (1, 1), (0, 0)]


def test_the_report_is_one_file_that_starts_with_the_losses() -> None:
    rows = [
        row("default", 2.0, 30, 40, workload="lost <here>"),
        row("a2", 1.0, 30, 40, workload="lost <here>"),
        row("default", 0.5, 10, 11, workload="won"),
        row("a2", 1.0, 30, 40, workload="won"),
        row("pd-full", 99.0, None, 40, workload="won", settings={"engine": "h100/qwen3-32b"}),
    ]
    html = compare_report(rows)
    assert not re.search(r"(src|href)=|@import|url\(|<script", html), "nothing is loaded"
    assert html.index("loses") < html.index("Fronts")
    assert html.index("lost &lt;here&gt;") < html.index(">won<")
    assert "not calibrated" in html
    assert html.count("<svg") == 2 * 3
    assert html.count("<circle") == 4 * 3, "what has no value or lies far out is in the table only"
    assert html.count("12,345") == len(rows)


def test_a_report_without_ours_still_shows_the_fronts() -> None:
    html = compare_report([row("a2", 1.0, 30, 40), row("suffix", 2.0, 30, 40)])
    assert "Goals" not in html
    assert html.count("<svg") == 3


@pytest.mark.parametrize("spread", [1.0, 1.01, 3.0, 900.0])
def test_axes_have_ticks_whatever_the_spread(spread: float) -> None:
    rows = [row("default", 1.0, 20, 20), row("a2", 1.0 * min(spread, 5), 20 * min(spread, 5), 20)]
    svg, out = front(rows, x="ttfet_p95_norm", y="tbt_p99_ms", x_label="x", y_label="y")
    assert out == 0
    assert svg.count('class="grid"') >= 2

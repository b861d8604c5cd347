"""`conserve simulate compare`: rows as promised, errors in one line, a failed run names the command that repeats it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from conserve_lab.cli import simulate_main
from conserve_lab.hardware import CALIBRATED, UnknownEngine, engine_kind
from conserve_lab.simulator import POLICIES, Arm, Cell, RunFailed, compare
from conserve_lab.simulator.agent import Agent
from conserve_lab.simulator.command import chosen_policies

PROMISED = {
    "workload",
    "load",
    "policy",
    "settings",
    "ttfet_p95_norm",
    "tbt_p99_ms",
    "tbt_p999_ms",
    "joules_per_output_token",
    "queue_wait_p95_ms",
    "reprefilled_tokens",
    "moved_tokens",
}


def test_a_comparison_writes_a_row_per_cell_and_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    given = "--workload service --load 2 --load 4 --policy a0@512 --policy default --conversations 8 --seeds 2"
    assert simulate_main(["compare", *given.split(), "--processes", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [(row["load"], row["policy"]) for row in rows] == [
        (2, "a0@512"),
        (2, "default"),
        (4, "a0@512"),
        (4, "default"),
    ]
    assert all(set(row) >= PROMISED for row in rows)
    assert all(row["settings"]["seeds"] == 2 for row in rows)
    assert "fitted to 101 decode" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--workload nope", "no workload 'nope'"),
        ("--trace /nowhere.jsonl", "no readable file"),
        ("--workload coding --with tools=slow", "no variation 'tools=slow'"),
        ("--workload coding --policy paper@0/1", "no policy 'paper@0/1'"),
        ("--workload coding --policy paper@1/2/3", "no policy 'paper@1/2/3'"),
        ("--workload coding --policy a0@1/2", "a0 has no prefillers: write a0@2"),
        ("--workload coding --policy nope", "no policy 'nope'"),
        ("--workload coding --policy a0@x", "no policy 'a0@x'"),
        ("--workload coding --engine h100/unknown", "unknown engine"),
        ("--workload coding --engine l4/qwen3-32b", "needs 66 GB"),
    ],
)
def test_wrong_usage_ends_in_one_line_and_exit_code_2(
    given: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate_main(["compare", *given.split(), "--processes", "1", "--conversations", "2"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_loads_relative_to_saturation_a_sweep_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turn = {"input_tokens_new": 900, "output_tokens": 20}
    (tmp_path / "mine.jsonl").write_text(json.dumps({"turns": [turn] * 3}) + "\n")
    monkeypatch.setenv("CONSERVE_TRACES", str(tmp_path))
    rows_path, html_path = tmp_path / "rows.json", tmp_path / "report.html"
    given = (
        "--trace mine --with burst=2 --with fail=1 --of-saturation 0.5 --of-saturation 2 --policy a2 --policy default"
    )
    files = ["--json", str(rows_path), "--html", str(html_path)]
    assert simulate_main(["compare", *given.split(), "--sweep", "--conversations", "8", "--seeds", "1", *files]) == 0
    rows = json.loads(rows_path.read_text())
    assert {row["workload"] for row in rows} == {"mine burst=2 fail=1"}
    slow, fast = sorted({row["load"] for row in rows})
    assert fast == pytest.approx(4 * slow, rel=0.01)
    assert [row["settings"]["saturation"] for row in rows[:: len(rows) // 2]] == [0.5, 2.0]
    chunks = [(row["policy"], row["settings"]["decode_chunk"]) for row in rows if row["load"] == slow]
    assert chunks[:4] == [("a2@512", 512), ("a2@1024", 1024), ("a2", 2944), ("a2@8192", 8192)]
    assert chunks[4:6] == [("default@512", 512), ("default", 768)], "its own and the four"
    assert len(chunks) == 9
    assert "Where ours loses" in html_path.read_text("utf-8")
    assert "report in" in capsys.readouterr().out


def test_chunks_are_given_per_role() -> None:
    (both, decode) = chosen_policies(["paper@8192/256", "a0@128"])
    assert (both.name, both.prefill_chunk, both.decode_chunk) == ("paper@8192/256", 8192, 256)
    assert (decode.name, decode.decode_chunk) == ("a0@128", 128)


def test_uncalibrated_engines_say_so() -> None:
    assert not engine_kind("h100/llama-3.1-8b").calibrated
    assert "not calibrated" in engine_kind("h100/llama-3.1-8b").source
    assert all("fitted" in kind.source for kind in CALIBRATED.values())
    with pytest.raises(UnknownEngine, match="choose one of"):
        engine_kind("b300/gpt")


def test_a_run_that_finds_itself_wrong_names_the_command_that_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Agent) -> None:
        raise AssertionError("the ledger is wrong")

    monkeypatch.setattr(Agent, "start", broken)
    cell = Cell(workload="coding", per_s=1.0, conversations=3, variations=("skew=3", "drain=1"))
    arm = Arm(cell=cell, policy=POLICIES["a2"], seed=9)
    with pytest.raises(RunFailed, match="the ledger is wrong; to repeat it: conserve simulate compare") as failed:
        compare([arm], processes=1, advance=lambda: None)
    monkeypatch.undo()
    words = shlex.split(str(failed.value).partition("to repeat it: ")[2])
    assert simulate_main([*words[2:], "--processes", "1"]) == 0


def test_a_trace_goes_on_from_its_start_when_it_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    turn = {"input_tokens_new": 500, "output_tokens": 20}
    path.write_text("".join(json.dumps({"id": str(n), "turns": [turn] * 3}) + "\n" for n in range(3)))
    cell = Cell(workload=str(path), per_s=5.0, conversations=7, turns_max=2)
    (row,) = compare([Arm(cell=cell, policy=POLICIES["paper"], seed=1)], processes=1, advance=lambda: None)
    assert row["conversations"] == 7
    assert row["migrations"] == 7
    assert row["workload"] == "t"

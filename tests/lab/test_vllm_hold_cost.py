"""`conserve bench hold` without an engine: what it refuses to measure, how it says what it found, and how it ends."""

from io import StringIO

import pytest
from rich.console import Console

from conserve_lab.cli import bench_main
from conserve_lab.vllm.hold_cost import HoldFigures, HoldRun, Pressed, hold_table


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strangers": 12}, "do not fill a cache of 12,288"),
        ({"conversations": 11}, "too many to be held"),
        ({"turns": 40}, "too many to be held"),
        ({"newcomer_tokens": 3_584}, "has to be above 3,584"),
        ({"newcomer_tokens": 6_145}, "up to 6,144 tokens"),
        ({"holders": 20, "newcomer_tokens": 0}, "has to be above 0"),
    ],
)
def test_a_run_that_could_not_show_a_difference_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        HoldRun(**changes)


def test_the_run_as_it_ships_can():
    assert HoldRun() == HoldRun(strangers=16, newcomer_tokens=3_904)


def test_the_table_has_shares_and_waits():
    found = HoldFigures(
        loose=Pressed(history_tokens=13_000, again_tokens=12_870, stranger_s=0.0151),
        held=Pressed(history_tokens=13_000, again_tokens=260, stranger_s=0.0249),
        newcomer_free_s=0.14,
        newcomer_full_s=19.96,
        newcomer_bounded_s=0.11,
        bounded_held_tokens=5_440,
        load=1.25,
    )
    shown = StringIO()
    console = Console(width=160, file=shown)
    console.print(hold_table(HoldRun(hold_s=20), found))
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.getvalue().splitlines()]
    assert "real vLLM, load 1.2" in lines
    assert "history computed again, of 13,000 tokens 99 % 2 %" in lines
    assert "a stranger's request, mean 15 ms 25 ms" in lines
    assert "a newcomer of 3,904 tokens at a full decoder 0.1 s 20.0 s" in lines
    assert "the same through the broker (5,440 tokens held) 0.1 s" in lines


def test_without_vllm_it_says_how_to_get_it(tmp_path, capsys):
    assert bench_main(["hold", "--vllm-venv", str(tmp_path), "--json", str(tmp_path / "hold.json")]) == 1
    assert "run: python -m conserve_lab.vllm" in capsys.readouterr().out
    assert not (tmp_path / "hold.json").exists()


def test_options_that_make_no_run_are_wrong_usage(capsys):
    assert bench_main(["hold", "--turns", "40"]) == 2
    assert "too many to be held" in capsys.readouterr().err

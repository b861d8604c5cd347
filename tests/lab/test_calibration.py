"""The fit finds what made the cells, says how far it is off, and refuses what fixes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from conserve_lab.calibration import (
    CalibrationError,
    Cells,
    DecodeCell,
    FittedEngine,
    cell_errors,
    fit,
    load_cells,
    save_cells,
)
from conserve_lab.cli import lab_main
from conserve_lab.engine_model import StepCost

from .known_engine import CHUNK, cells_of

TRUE = FittedEngine(
    cost=StepCost(
        base_us=5_000,
        floor_us=12_000,
        decode_us_per_sequence=40,
        decode_ns_per_context_token=150,
        prefill_tokens_per_s=50_000,
        prefill_attention_ps_per_pair=2_000,
    ),
    front_us=20_000,
)


def _cells() -> Cells:
    return cells_of(
        TRUE,
        sequences=(1, 8, 32, 128),
        context_tokens=(128, 1_024, 4_096),
        prompt_tokens=(128, 512, 4_096, 16_384, 65_536),
    )


def test_a_fit_finds_the_engine_that_made_the_cells() -> None:
    errors = [abs(error) for *_, error in cell_errors(fit(_cells()), _cells())]
    assert max(errors) < 0.02


def test_cells_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    save_cells(path, _cells())
    assert load_cells(path) == _cells()


@pytest.mark.parametrize(
    "text", ["[]", "{}", "no json", '{"decode_grid": [{"B": 1}], "prefill": []}', '{"decode_grid": 3, "prefill": []}']
)
def test_a_file_of_another_shape_is_refused_with_what_it_needs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cells.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match="decode_grid with B"):
        load_cells(path)


def test_too_few_cells_fix_nothing() -> None:
    few = Cells(source="", engine="", max_num_batched_tokens=CHUNK, decode=_cells().decode[:3], prefill=())
    with pytest.raises(CalibrationError, match="3 decode and 0 prefill"):
        fit(few)


def test_the_command_prints_the_error_of_each_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, figures = tmp_path / "cells.json", tmp_path / "out.json"
    save_cells(path, _cells())
    assert lab_main(["calibrate", "--cells", str(path), "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    assert "prefill 65536" in shown
    data = json.loads(figures.read_text())
    assert len(data["cells"]) == 17
    assert data["worst_error"] < 0.02


def test_the_command_fails_where_the_model_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cells.json"
    cells = _cells()
    odd = DecodeCell(sequences=1, context_tokens=128, step_us=90_000)
    save_cells(
        path,
        Cells(
            source="",
            engine="",
            max_num_batched_tokens=CHUNK,
            decode=(odd, *cells.decode),
            prefill=cells.prefill,
        ),
    )
    assert lab_main(["calibrate", "--cells", str(path)]) == 1
    assert "at worst" in capsys.readouterr().out


def test_the_command_says_what_is_wrong_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cells.json"
    path.write_text("{}")
    assert lab_main(["calibrate", "--cells", str(path)]) == 2
    assert capsys.readouterr().err.startswith("conserve lab: ")
    assert lab_main(["calibrate"]) == 2


PUBLISHED = os.environ.get("CONSERVE_TRACES", "")


@pytest.mark.skipif(not PUBLISHED, reason="CONSERVE_TRACES names no folder with the published A40 cells")
@pytest.mark.parametrize("column", ["miss_300W_s", "miss_200W_s"])
def test_the_published_a40_cells_fit(column: str) -> None:
    cells = load_cells(Path(PUBLISHED) / "a40_qwen3_0.6b_calibration.json", prefill_column=column)
    errors = [abs(error) for *_, error in cell_errors(fit(cells), cells)]
    assert (len(cells.decode), len(cells.prefill)) == (101, 19)
    assert max(errors) < 0.15
    assert sum(errors) / len(errors) < 0.05

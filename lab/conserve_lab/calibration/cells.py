"""Measured cells: how long an engine takes for one known piece of work."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conserve_lab.calibration.errors import CalibrationError


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCell:
    """Time between tokens with `sequences` decoding that hold `context_tokens` together."""

    sequences: int
    context_tokens: int
    step_us: int

    def __str__(self) -> str:
        return f"decode {self.sequences} x {self.context_tokens // self.sequences}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCell:
    """Time to the first token of a prompt that nothing of was cached, on an engine that had nothing else to do."""

    prompt_tokens: int
    first_token_us: int

    def __str__(self) -> str:
        return f"prefill {self.prompt_tokens}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """What was measured of one engine.

    Attributes:
        source: where the figures come from.
        engine: hardware, engine version and model.
        max_num_batched_tokens: the engine's chunk of prefill while it was measured.
    """

    source: str
    engine: str
    max_num_batched_tokens: int
    decode: tuple[DecodeCell, ...]
    prefill: tuple[PrefillCell, ...]


def load_cells(path: Path, *, prefill_column: str = "first_token_s") -> Cells:
    """Read a file of cells.

    Args:
        path: JSON with `decode_grid` (rows of `B`, `sum_kv`, `mean_ms`) and `prefill` (rows of `L` and
            `prefill_column`).
        prefill_column: name of the column with the prefill times, in seconds; files with several power caps have
            several.

    Raises:
        CalibrationError: the file is not of that shape.
        OSError: it cannot be read.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return Cells(
            source=str(data.get("source", path.name)),
            engine=str(data.get("gpu", "unnamed engine")),
            max_num_batched_tokens=int(data.get("max_num_batched_tokens", 2944)),
            decode=tuple(
                DecodeCell(
                    sequences=int(row["B"]),
                    context_tokens=int(row["sum_kv"]),
                    step_us=round(float(row["mean_ms"]) * 1000),
                )
                for row in data["decode_grid"]
            ),
            prefill=tuple(
                PrefillCell(prompt_tokens=int(row["L"]), first_token_us=round(float(row[prefill_column]) * 1_000_000))
                for row in data["prefill"]
            ),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(
            f"{path} is no file of cells ({type(error).__name__}: {error}): it needs decode_grid with B, sum_kv and "
            f"mean_ms, and prefill with L and {prefill_column}"
        ) from error


def save_cells(path: Path, cells: Cells) -> None:
    """Write cells in the form that `load_cells` reads.

    Raises:
        OSError: the file cannot be written.
    """
    data = {
        "source": cells.source,
        "gpu": cells.engine,
        "max_num_batched_tokens": cells.max_num_batched_tokens,
        "decode_grid": [
            {"B": cell.sequences, "sum_kv": cell.context_tokens, "mean_ms": cell.step_us / 1000}
            for cell in cells.decode
        ],
        "prefill": [
            {"L": cell.prompt_tokens, "first_token_s": cell.first_token_us / 1_000_000} for cell in cells.prefill
        ],
    }
    path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")

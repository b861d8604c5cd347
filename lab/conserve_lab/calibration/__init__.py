"""How well the engine model predicts a real engine: cells, the fit to them, and its error."""

from __future__ import annotations

from conserve_lab.calibration.cells import Cells, DecodeCell, PrefillCell, load_cells, save_cells
from conserve_lab.calibration.errors import CalibrationError
from conserve_lab.calibration.fit import FittedEngine, cell_errors, fit

__all__ = [
    "CalibrationError",
    "Cells",
    "DecodeCell",
    "FittedEngine",
    "PrefillCell",
    "cell_errors",
    "fit",
    "load_cells",
    "save_cells",
]

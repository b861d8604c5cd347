"""What can go wrong with a calibration."""

from __future__ import annotations


class CalibrationError(Exception):
    """The cells cannot be used; the message says why and what to do."""

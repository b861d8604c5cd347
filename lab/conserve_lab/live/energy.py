"""Joules of the GPUs: NVML's counters for those of this machine, a DCGM exporter's for those of others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import httpx2

_DCGM_TOTAL = re.compile(
    r"^DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION(?:\{[^}]*\})? (?P<millijoules>[0-9.eE+]+)", re.MULTILINE
)
_DCGM_BUDGET_S = 10.0


class EnergyUnknown(Exception):  # noqa: N818 -- says what is missing
    """Nothing here counts energy; the message says why and what would."""


class EnergyMeter(Protocol):
    """Counts joules since some instant; only differences mean anything."""

    source: str

    def joules(self) -> float:
        """Return what all its GPUs have used so far."""
        ...


class NvmlMeter:
    """The GPUs of this machine, by NVML (`nvidia-ml-py`, in the extra `energy`).

    Raises:
        EnergyUnknown: there is no NVML here, no GPU, or one that does not count (before Volta).
    """

    source = "nvml"

    def __init__(self) -> None:
        try:
            self._nvml: Any = import_module("pynvml")
        except ImportError:
            raise EnergyUnknown("nvidia-ml-py is not installed: pip install 'conserve-sdk[energy]'") from None
        try:
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self._gpus = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
            self.joules()
        except self._nvml.NVMLError as error:
            raise EnergyUnknown(f"NVML finds no GPU that counts energy here: {error}") from error
        if not self._gpus:
            raise EnergyUnknown("NVML finds no GPU here")

    def joules(self) -> float:
        """Return what all GPUs of this machine have used since their driver was loaded."""
        return sum(float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) for gpu in self._gpus) / 1000


class DcgmMeter:
    """The GPUs behind DCGM exporters (their `/metrics` pages).

    Raises:
        EnergyUnknown: an exporter does not answer, or tells no energy.
    """

    source = "dcgm"

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls
        self.joules()

    def joules(self) -> float:
        """Return what all their GPUs have used since their driver was loaded."""
        return sum(self._of(url) for url in self._urls)

    def _of(self, url: str) -> float:
        try:
            page = httpx2.get(url, timeout=_DCGM_BUDGET_S, trust_env=False).raise_for_status().text
        except httpx2.HTTPError as error:
            raise EnergyUnknown(f"the DCGM exporter {url} does not answer: {error}") from error
        found = [float(match["millijoules"]) for match in _DCGM_TOTAL.finditer(page)]
        if not found:
            raise EnergyUnknown(f"{url} tells no DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION: enable that field there")
        return sum(found) / 1000


def energy_meter(dcgm_urls: Sequence[str]) -> EnergyMeter:
    """Return the DCGM exporters' meter where any are named, else this machine's.

    Raises:
        EnergyUnknown: nothing counts energy.
    """
    return DcgmMeter(dcgm_urls) if dcgm_urls else NvmlMeter()

"""A vLLM-shaped fleet without GPUs: HTTP servers in wall time over the pure engine model.

`EmulatedFleet` runs engines inside a process, `conserve emulate` runs them for other processes.
"""

from __future__ import annotations

from conserve_lab.emulator.command import emulate_main
from conserve_lab.emulator.config import (
    EmulatorConfig,
    FleetConfig,
    FleetConfigError,
    default_fleet,
    fleet_of,
    load_fleet_config,
)
from conserve_lab.emulator.faults import FaultOrder
from conserve_lab.emulator.fleet import EmulatedEngine, EmulatedFleet
from conserve_lab.emulator.records import RequestRecord

__all__ = [
    "EmulatedEngine",
    "EmulatedFleet",
    "EmulatorConfig",
    "FaultOrder",
    "FleetConfig",
    "FleetConfigError",
    "RequestRecord",
    "default_fleet",
    "emulate_main",
    "fleet_of",
    "load_fleet_config",
]

"""Real vLLM on this machine's CPU: an environment for it, a tiny model, and a fleet that moves KV by NIXL.

What the emulator claims, this proves: the same protocol against the engine itself, judged by its own counters.
vLLM lives in its own environment (`python -m conserve_lab.vllm .venv-vllm`) and is never imported here;
the files under `runtime/` are the only ones that run beside it.
"""

from conserve_lab.vllm._engine import Engine, Role
from conserve_lab.vllm._model import ModelShape
from conserve_lab.vllm.counters import EngineCounters, parse_counters
from conserve_lab.vllm.errors import (
    VllmEngineDiedError,
    VllmError,
    VllmInstallError,
    VllmMissingError,
    VllmStartError,
)
from conserve_lab.vllm.fleet import FleetOptions, VllmFleet, find_venv

__all__ = [
    "Engine",
    "EngineCounters",
    "FleetOptions",
    "ModelShape",
    "Role",
    "VllmEngineDiedError",
    "VllmError",
    "VllmFleet",
    "VllmInstallError",
    "VllmMissingError",
    "VllmStartError",
    "find_venv",
    "parse_counters",
]

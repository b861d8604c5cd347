"""A continuous-batching engine as a pure state machine: no clock, no I/O, no randomness.

Time comes in as whole microseconds and the model says how long each step takes. A driver supplies the time: the
emulator sleeps through it, a simulator jumps over it.
"""

from __future__ import annotations

from conserve_lab.engine_model.blocks import BlockPool
from conserve_lab.engine_model.config import EngineModelConfig, StepCost, TransferCost
from conserve_lab.engine_model.counters import EngineCounters
from conserve_lab.engine_model.holds import Hold, Holds
from conserve_lab.engine_model.host_tier import HostTier
from conserve_lab.engine_model.leap import Leap
from conserve_lab.engine_model.model import EngineModel
from conserve_lab.engine_model.results import FetchStart, Progress, PromptSources, StepResult
from conserve_lab.engine_model.sequence import EngineRequest, SequenceState
from conserve_lab.engine_model.transfer import TransferLink

__all__ = [
    "BlockPool",
    "EngineCounters",
    "EngineModel",
    "EngineModelConfig",
    "EngineRequest",
    "FetchStart",
    "Hold",
    "Holds",
    "HostTier",
    "Leap",
    "Progress",
    "PromptSources",
    "SequenceState",
    "StepCost",
    "StepResult",
    "TransferCost",
    "TransferLink",
]

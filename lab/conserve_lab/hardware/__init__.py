"""GPUs, models, and what an engine made of the two costs in time and energy. Every figure names its source."""

from __future__ import annotations

from conserve_lab.hardware.engines import CALIBRATED, EngineKind, UnknownEngine, engine_kind
from conserve_lab.hardware.gpus import GPUS, Gpu
from conserve_lab.hardware.models import MODELS, Model
from conserve_lab.hardware.power import PowerModel

__all__ = ["CALIBRATED", "GPUS", "MODELS", "EngineKind", "Gpu", "Model", "PowerModel", "UnknownEngine", "engine_kind"]

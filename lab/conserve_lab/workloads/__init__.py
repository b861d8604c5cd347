"""Conversations to replay: sizes only. Loaders for published traces, and a seeded generator."""

from __future__ import annotations

from conserve_lab.workloads.arrivals import poisson_arrivals
from conserve_lab.workloads.conversation import Conversation, Turn, WorkloadError
from conserve_lab.workloads.generator import SHAPES, Shape, generate
from conserve_lab.workloads.loaders import load_conversations
from conserve_lab.workloads.named import TRACES_VARIABLE, short_name, trace_path
from conserve_lab.workloads.variations import VARIATIONS, parse_variation, value_of, vary

__all__ = [
    "SHAPES",
    "TRACES_VARIABLE",
    "VARIATIONS",
    "Conversation",
    "Shape",
    "Turn",
    "WorkloadError",
    "generate",
    "load_conversations",
    "parse_variation",
    "poisson_arrivals",
    "short_name",
    "trace_path",
    "value_of",
    "vary",
]

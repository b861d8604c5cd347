"""Conversations to replay: sizes only. Loaders for published traces, and a seeded generator."""

from __future__ import annotations

from conserve_lab.workloads.arrivals import poisson_arrivals
from conserve_lab.workloads.conversation import Conversation, Turn, WorkloadError
from conserve_lab.workloads.generator import SHAPES, Shape, generate
from conserve_lab.workloads.loaders import load_conversations

__all__ = [
    "SHAPES",
    "Conversation",
    "Shape",
    "Turn",
    "WorkloadError",
    "generate",
    "load_conversations",
    "poisson_arrivals",
]

"""Random numbers that are nobody else's."""

from __future__ import annotations

import random

__all__ = ["own_random"]

own_random = random.SystemRandom().random
"""From 0 up to 1. Not the stream of `random` itself, which an application may have seeded to repeat its own numbers."""

"""The three OpenAI routes that carry a turn."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """Which OpenAI route a turn uses; decides where its prompt, its limits and its usage stand in the JSON."""

    CHAT = "chat"
    """`*/chat/completions`."""
    COMPLETIONS = "completions"
    """`*/completions`."""
    RESPONSES = "responses"
    """`*/responses`."""

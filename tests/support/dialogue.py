"""Conversations that tests send."""

from __future__ import annotations

__all__ = ["LONG", "follow_up"]

LONG = "hello " * 400
"""Too long for a side request."""


def follow_up(turns: int = 1, *, answer: str = "ok", more: str = "more") -> list[dict]:
    """The messages of a conversation after so many answers."""
    messages = [{"role": "user", "content": LONG}]
    for _ in range(turns):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": more}]
    return messages

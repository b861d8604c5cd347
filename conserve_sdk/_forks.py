"""Notices a conversation that starts over again and again because its application rewrites what was said before."""

from __future__ import annotations

from typing import NamedTuple

from conserve_sdk._digest import Head, PromptDigest

__all__ = ["ForkWatch", "Rewrite"]

FORKS_MAX = 5
"""So many turns more may start over than go on before it is worth a word: a handoff or a compaction is no habit."""


class Rewrite(NamedTuple):
    """The first message that is not what it was; never what it says.

    Attributes:
        message: its place among the request's messages, from 0.
        role: as the request names it.
    """

    message: int
    role: str


class ForkWatch:
    """Counts for one conversation.

    A fork counts when it is longer than the prompt it resembles most: a history that went on and changed on the way.
    Another task under the same system prompt, a summary and a compacted history are not longer, and no mistake.
    """

    __slots__ = ("_excess",)

    def __init__(self) -> None:
        self._excess = 0

    def extended(self) -> None:
        """A turn went on where one had ended."""
        self._excess = max(0, self._excess - 1)

    def forked(self, digest: PromptDigest, *, shared_items: int, parent: Head) -> Rewrite | None:
        """A turn started a new lineage.

        Args:
            digest: of its prompt.
            shared_items: items it shares with `parent`; the preamble is item one.
            parent: the prompt it resembles most.

        Returns:
            What changed, where this has become a habit.
        """
        if not digest.roles or not shared_items or digest.items <= parent.items:
            return None
        self._excess += 1
        index = shared_items - 1
        return Rewrite(index, digest.roles[index]) if self._excess >= FORKS_MAX else None

"""Notices a conversation that starts over again and again because its application rewrites what was said before."""

from __future__ import annotations

from typing import NamedTuple

from conserve_sdk._digest import Head, PromptDigest, is_models_own

__all__ = ["ForkWatch", "Rewrite", "goes_on_from"]

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


def goes_on_from(digest: PromptDigest, head: Head, *, shared_items: int) -> bool:
    """Tell whether a prompt is the history that ended in `head`, gone on and changed on the way.

    Context editing changes what stands in the middle; a compaction puts a summary in place of the beginning and keeps
    the last messages. Either way nothing will extend the old history any more. A sub-agent, a handoff and the branches
    of a fan-out are none of that: they do not share the system prompt, or bring no answer of the model beyond what they
    share.

    Args:
        digest: of the prompt, which extends nothing.
        head: of the prompt it resembles most.
        shared_items: items it shares with that one; the preamble is item one.
    """
    leading = digest.opening_items - 2  # without the preamble and the first message that is not the system's
    if not digest.roles or shared_items < 1 + leading:
        return False
    own = [number for number, role in enumerate(digest.roles, start=1) if is_models_own(role)]
    if not own or own[-1] < shared_items:
        return False
    edited = own[0] < shared_items and digest.items > head.items
    return edited or _keeps_the_end(digest, head, shared_items=shared_items, own=frozenset(own))


def _keeps_the_end(digest: PromptDigest, head: Head, *, shared_items: int, own: frozenset[int]) -> bool:
    """Whether a message from the end of the old history comes again, and the model's answer to it next."""
    old = frozenset(head.marks[max(0, shared_items - (head.items - len(head.marks))) :])
    first = digest.items - len(digest.head.marks)
    return any(
        mark in old and first + place >= shared_items and first + place + 1 in own
        for place, mark in enumerate(digest.head.marks)
    )

"""Lineages by content: does this request extend a prefix that its conversation has sent before?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conserve_sdk._kind import Kind
from conserve_sdk.core.units import ConversationId, LineageId

__all__ = ["Kind", "LineageBook", "LineageMatch", "PromptDigest", "digest_prompt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptDigest:
    """A prompt without its text.

    Attributes:
        kind: the route.
        text_bytes: UTF-8 bytes of the prompt's text (tools and message framing included, media left out).
        items: number of items: the preamble (model, tools, template options) counts as one, then each message.
    """

    kind: Kind
    text_bytes: int
    items: int
    _private: object = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageMatch:
    """Where a request belongs.

    Attributes:
        conversation_id: the given one, or one made up for an anonymous conversation.
        lineage: the lineage it extends, or the id of a new one. Deterministic for a given conversation and opening
            (preamble and everything up to the first message that is not the system's), so that another process that
            continues the conversation asks the broker for the same lease.
        extends: True when a known prompt of that lineage is a prefix of this one (or is equal to it).
        shared_items: items shared with the lineage (or, for a new one, with its `parent`).
        parent: for a new lineage, the lineage of the same conversation that shares most with it, if any.
        uncached_bytes: bytes of the prompt's text beyond the shared items.
        anonymous: True when `conversation_id` was made up here.
    """

    conversation_id: ConversationId
    lineage: LineageId
    extends: bool
    shared_items: int
    parent: LineageId | None
    uncached_bytes: int
    anonymous: bool = False


def digest_prompt(kind: Kind, body: Mapping[str, Any]) -> PromptDigest:
    """Digest all that enters the prompt of a request, never keeping its text.

    Args:
        kind: the route.
        body: the request's JSON object as the application sent it.
    """
    raise NotImplementedError


class LineageBook:
    """Remembers, per conversation, the prompts that its lineages end with. Thread-safe, bounded, LRU."""

    def __init__(self, *, conversations_max: int = 10_000, lineages_max: int = 64, heads_max: int = 8) -> None:
        raise NotImplementedError

    def match(
        self,
        conversation: ConversationId | None,
        digest: PromptDigest,
        *,
        explicit_lineage: LineageId | None = None,
        previous_response_id: str | None = None,
    ) -> LineageMatch:
        """Find the lineage of a request. Changes nothing: call `commit` when the request was served.

        Args:
            conversation: None for an anonymous conversation.
            digest: of the request.
            explicit_lineage: the application's own name for the lineage.
            previous_response_id: of the Responses API: continues the lineage that gave that answer.
        """
        raise NotImplementedError

    def commit(self, match: LineageMatch, digest: PromptDigest, response_id: str | None = None) -> None:
        """Note that the request was served (its prompt is in its decoder's cache)."""
        raise NotImplementedError

    def forget(self, conversation: ConversationId) -> None:
        """Drop all that is known of a conversation."""
        raise NotImplementedError

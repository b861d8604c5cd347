"""Lineages by content: does this request extend a prefix that its conversation has sent before?

A lineage is one growing prefix. It usually has one head, the last prompt that was served; parallel branches of one
prompt that ran at the same time leave several. A prompt that extends no head is a new lineage: a sub-agent, a
summariser, or the same history with something changed in the middle.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from conserve_sdk._digest import Head, PromptDigest, digest_prompt
from conserve_sdk._fork import call_in_forked_child
from conserve_sdk._forks import ForkWatch, Rewrite, goes_on_from
from conserve_sdk._kind import Kind
from conserve_sdk.core._quick import quick_init
from conserve_sdk.core.units import ConversationId, LineageId

__all__ = ["Kind", "LineageBook", "LineageMatch", "PromptDigest", "Rewrite", "digest_prompt"]

_SAME_END_MAX = 256
"""Anonymous conversations with the same last link that are looked at (prompt strings under one block have only one)."""


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LineageMatch:
    """Where a request belongs.

    Attributes:
        conversation_id: the given one, or one made up for an anonymous conversation.
        lineage: the lineage it extends, or the id of a new one. Deterministic for a given conversation and opening
            (preamble and everything up to the first message that is not the system's), so that another process that
            continues the conversation asks the broker for the same lease.
        extends: True when all of a known prompt of that lineage begins this one, or this one begins a known prompt.
        shared_items: items shared with the lineage (or, for a new one, with its `parent`); the preamble is item one,
            so 0 and 1 mean that nothing worth keeping is shared.
        parent: for a new lineage of a known conversation, the lineage that shares most with it (the most recent one
            when none shares anything), else None.
        replaces: for a new lineage, the one whose history it is, rewritten: nothing will extend that one any more.
        uncached_bytes: bytes of the prompt's text beyond the shared items.
        append_bytes: of those, the ones that the model did not write itself.
        anonymous: True when `conversation_id` was made up here.
        continued: True when the request names its predecessor (`previous_response_id`) instead of repeating it.
    """

    conversation_id: ConversationId
    lineage: LineageId
    extends: bool
    shared_items: int
    parent: LineageId | None
    uncached_bytes: int
    append_bytes: int
    anonymous: bool = False
    continued: bool = False
    replaces: LineageId | None = None


@dataclass(slots=True)
class _Conversation:
    anonymous: bool
    heads: OrderedDict[LineageId, list[Head]] = field(default_factory=OrderedDict)
    forks: ForkWatch = field(default_factory=ForkWatch)


class LineageBook:
    """Remembers, per conversation, the prompts that its lineages end with. Thread-safe; bounded, least used go first.

    Args:
        conversations_max: conversations kept.
        lineages_max: lineages kept per conversation.
        heads_max: heads kept per lineage.
    """

    def __init__(self, *, conversations_max: int = 10_000, lineages_max: int = 64, heads_max: int = 8) -> None:
        self._conversations_max = conversations_max
        self._lineages_max = lineages_max
        self._heads_max = heads_max
        self._conversations: OrderedDict[ConversationId, _Conversation] = OrderedDict()
        self._anonymous_ends: dict[bytes, dict[ConversationId, None]] = {}
        self._responses: OrderedDict[str, tuple[ConversationId, LineageId]] = OrderedDict()
        self._lock = threading.Lock()
        call_in_forked_child(self._start_afresh)

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
            previous_response_id: of the Responses API: continues the lineage that gave that answer, where it is known.
        """
        with self._lock:
            continued = self._match_response(conversation, digest, previous_response_id)
            if continued:
                return continued
            if conversation is None:
                return self._match_anonymous(digest, explicit_lineage)
            known = self._conversations.get(conversation)
            return _match_known(conversation, known or _Conversation(anonymous=False), digest, explicit_lineage)

    def commit(self, match: LineageMatch, digest: PromptDigest, response_id: str | None = None) -> Rewrite | None:
        """Note that the request was served (its prompt is in its decoder's cache).

        Args:
            match: of this request.
            digest: of this request.
            response_id: the answer's id, which a later request may name as its predecessor.

        Returns:
            What the application keeps changing, where this conversation starts over again and again.
        """
        with self._lock:
            entry = self._conversations.setdefault(match.conversation_id, _Conversation(anonymous=match.anonymous))
            self._conversations.move_to_end(match.conversation_id)
            rewrite = _watch_forks(entry, match, digest)
            heads = entry.heads.setdefault(match.lineage, [])
            entry.heads.move_to_end(match.lineage)
            if not match.continued:
                self._set_heads(match.conversation_id, entry, heads, digest)
            if response_id:
                self._responses[response_id] = (match.conversation_id, match.lineage)
            self._evict(match.conversation_id, entry)
            return rewrite

    def forget(self, conversation: ConversationId) -> None:
        """Drop all that is known of a conversation."""
        with self._lock:
            self._drop(conversation)
            gone = [response for response, (owner, _) in self._responses.items() if owner == conversation]
            for response in gone:
                del self._responses[response]

    def _match_response(
        self, conversation: ConversationId | None, digest: PromptDigest, response_id: str | None
    ) -> LineageMatch | None:
        owner = self._responses.get(response_id) if response_id else None
        if owner is None or conversation not in (None, owner[0]):
            return None
        entry = self._conversations.get(owner[0])
        return LineageMatch(
            conversation_id=owner[0],
            lineage=owner[1],
            extends=True,
            shared_items=0,
            parent=None,
            uncached_bytes=digest.text_bytes,
            append_bytes=digest.text_bytes,
            anonymous=entry.anonymous if entry else conversation is None,
            continued=True,
        )

    def _match_anonymous(self, digest: PromptDigest, explicit: LineageId | None) -> LineageMatch:
        for conversation in self._anonymous_candidates(digest):
            found = _match_known(conversation, self._conversations[conversation], digest, explicit)
            if found.extends:
                return found
        return _match_known(
            ConversationId(f"anon-{secrets.token_hex(12)}"), _Conversation(anonymous=True), digest, explicit
        )

    def _anonymous_candidates(self, digest: PromptDigest) -> Iterator[ConversationId]:
        """Conversations with a head that ends where this prompt passes, the longest first."""
        for item in range(digest.items - 1, -1, -1):
            ends = self._anonymous_ends.get(digest.link(item))
            yield from list(reversed(ends or {}))[:_SAME_END_MAX]

    def _set_heads(
        self, conversation: ConversationId, entry: _Conversation, heads: list[Head], digest: PromptDigest
    ) -> None:
        kept = [head for head in heads if not digest.extends(head)]
        gone = [head for head in heads if head not in kept]
        kept.append(digest.head)
        gone += kept[: -self._heads_max]
        heads[:] = kept[-self._heads_max :]
        if entry.anonymous:
            self._unlink(conversation, gone)
            for head in heads:
                self._anonymous_ends.setdefault(head.last_link, {})[conversation] = None

    def _evict(self, conversation: ConversationId, entry: _Conversation) -> None:
        while len(entry.heads) > self._lineages_max:
            _, heads = entry.heads.popitem(last=False)
            self._unlink(conversation, heads)
        while len(self._conversations) > self._conversations_max:
            self._drop(next(iter(self._conversations)))
        while len(self._responses) > self._conversations_max:
            self._responses.popitem(last=False)

    def _drop(self, conversation: ConversationId) -> None:
        entry = self._conversations.pop(conversation, None)
        if entry is not None and entry.anonymous:
            self._unlink(conversation, [head for heads in entry.heads.values() for head in heads])

    def _unlink(self, conversation: ConversationId, heads: list[Head]) -> None:
        for head in heads:
            ends = self._anonymous_ends.get(head.last_link)
            if ends is not None:
                ends.pop(conversation, None)
                if not ends:
                    del self._anonymous_ends[head.last_link]

    def _start_afresh(self) -> None:
        # A thread may have been inside at the fork. Nothing is lost: lineage ids come from the content.
        self._lock = threading.Lock()
        self._conversations = OrderedDict()
        self._anonymous_ends = {}
        self._responses = OrderedDict()


def _match_known(
    conversation: ConversationId, entry: _Conversation, digest: PromptDigest, explicit: LineageId | None
) -> LineageMatch:
    if explicit is not None:
        extends, shared = _closeness(entry.heads.get(explicit, []), digest)
        return _as_match(conversation, entry, digest, lineage=explicit, extends=extends, shared=shared)
    best: tuple[tuple[bool, int], LineageId] | None = None
    for lineage, heads in reversed(entry.heads.items()):  # the most recent first: it wins a tie
        close = _closeness(heads, digest)
        if best is None or close > best[0]:
            best = (close, lineage)
    if best is None:
        return _as_match(conversation, entry, digest, lineage=_new_lineage(entry, digest, 0), extends=False, shared=0)
    (extends, shared), lineage = best
    if extends:
        return _as_match(conversation, entry, digest, lineage=lineage, extends=True, shared=shared)
    made = _new_lineage(entry, digest, shared)
    match = _as_match(conversation, entry, digest, lineage=made, extends=False, shared=shared, parent=lineage)
    heads = entry.heads[lineage]  # several of them: branches that live on beside each other
    rewrites = len(heads) == 1 and goes_on_from(digest, heads[0], shared_items=shared)
    return replace(match, replaces=lineage) if rewrites else match


def _as_match(
    conversation: ConversationId,
    entry: _Conversation,
    digest: PromptDigest,
    *,
    lineage: LineageId,
    extends: bool,
    shared: int,
    parent: LineageId | None = None,
) -> LineageMatch:
    return LineageMatch(
        conversation_id=conversation,
        lineage=lineage,
        extends=extends,
        shared_items=shared,
        parent=parent,
        uncached_bytes=digest.bytes_beyond(shared),
        append_bytes=digest.appended_bytes(shared),
        anonymous=entry.anonymous,
    )


def _watch_forks(entry: _Conversation, match: LineageMatch, digest: PromptDigest) -> Rewrite | None:
    """Count a turn once, at its first commit: the second one finds its own head."""
    heads = entry.heads.get(match.lineage)
    if heads is not None:
        if digest.head not in heads:
            entry.forks.extended()
        return None
    parents = entry.heads.get(match.parent) if match.parent is not None else None
    return entry.forks.forked(digest, shared_items=match.shared_items, parent=parents[-1]) if parents else None


def _closeness(heads: list[Head], digest: PromptDigest) -> tuple[bool, int]:
    """Whether the prompt extends one of the heads, and how many items it shares with the closest of those."""
    best = (False, 0)
    for head in heads:
        shared = digest.shared_items(head)
        best = max(best, (digest.extends(head) or shared == digest.items, shared))
    return best


def _new_lineage(entry: _Conversation, digest: PromptDigest, shared: int) -> LineageId:
    """Name a new lineage after its opening; if that is taken, after the first item in which it differs, too."""
    base = f"l-{digest.link(digest.opening_items - 1)[:8].hex()}"
    if base not in entry.heads:
        return LineageId(base)
    fork = digest.link(min(max(shared, digest.opening_items), digest.items - 1))
    return LineageId(f"{base}-{fork[:4].hex()}")

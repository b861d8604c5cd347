"""Long prompts in slices: requests that each compute a little more and leave it in the engine's prefix cache.

An engine computes one prompt after the other, so a short one that comes behind a giant waits for all of it. Between two
slices it takes whoever waits. Only text is cut, and only where its beginning is a prompt too: messages of the chat
route by whoever is not the model, and prompt strings. What cannot be cut travels in the slice behind it.

On vLLM 0.32 a slice finds all of the one before but its last block and what the chat template puts behind a message.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from conserve_sdk._bodies import JsonObject, TurnBody, dump, one_token
from conserve_sdk._digest import BLOCK_BYTES
from conserve_sdk._kind import Kind

__all__ = ["cuts", "slice_legs"]

_CUT_ROLES = frozenset({"system", "developer", "user", "tool", "function"})


def slice_legs(body: TurnBody, *, held_items: int, slice_chars: int) -> Iterator[bytes]:
    """Bodies of requests for the prompt's beginnings, each about `slice_chars` longer; the rest is the turn itself.

    Args:
        body: of the turn.
        held_items: so many of the first items of the prompt's digest are in the engine's cache already.
        slice_chars: characters of text in a slice. The rest that is left to the turn has half of that at least and
            one and a half at most.
    """
    if body.local_because:
        return
    data, held = body.data, max(held_items - 1, 0)  # the preamble comes first, and is no message
    if body.kind is Kind.CHAT and isinstance(data.get("messages"), list):
        for messages in _beginnings(data["messages"], held_messages=held, slice_chars=slice_chars):
            yield dump({**one_token(body, data), "messages": messages})
    elif body.kind is Kind.COMPLETIONS and isinstance(data.get("prompt"), str):
        for cut in cuts(len(data["prompt"]), held=held * BLOCK_BYTES, size=slice_chars):
            yield dump({**one_token(body, data), "prompt": data["prompt"][:cut]})


def cuts(length: int, *, held: int, size: int) -> range:
    """Where a prompt is cut, in its own unit: after each slice of what is not held, but for a short rest."""
    return range(held + size, length - size // 2, size)


def _beginnings(messages: list[Any], *, held_messages: int, slice_chars: int) -> Iterator[list[Any]]:
    ends = list(accumulate(_chars(message) for message in messages))
    held_chars = ends[min(held_messages, len(ends)) - 1] if held_messages and ends else 0
    last: list[Any] = messages[:held_messages]
    for cut in cuts(ends[-1] if ends else 0, held=held_chars, size=slice_chars):
        number = bisect_left(ends, cut)
        before = ends[number - 1] if number else 0
        beginning = [*messages[:number], *_begun(messages[number], cut - before)]
        if beginning and beginning != last:  # several cuts inside what cannot be cut are one
            yield beginning
            last = beginning


def _begun(message: Any, chars: int) -> list[JsonObject]:
    """The beginning of a message, if it can be cut."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str) or message.get("role") not in _CUT_ROLES:
        return []
    return [{**message, "content": content[:chars]}]


def _chars(message: Any) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return sum(len(text) for text in texts if isinstance(text, str))

"""A reversible tokenizer: four UTF-8 bytes are one token.

A token id is its four bytes read as a little-endian integer. A text's last token is padded with 0xFF, and marks
(roles, tool calls, end of turn) have 0xFE as their fourth byte: neither byte occurs in UTF-8, so ids map back to
text without a table and every process agrees on them.
"""

from __future__ import annotations

import codecs
import re
from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum
from functools import lru_cache
from hashlib import blake2b
from typing import TypeAlias

TokenIds: TypeAlias = "array[int]"
"""Token ids as an array of unsigned 32-bit integers."""

_PAD = b"\xff"
_MARK_BASE = 0xFE00_0000
_MARK_PATTERN = re.compile(rb"(.)\x00\x00\xfe", re.DOTALL)


class Mark(IntEnum):
    """Special tokens of the chat template."""

    END = 1
    SYSTEM = 2
    USER = 3
    ASSISTANT = 4
    TOOL = 5
    TOOLS = 6
    CALL = 7
    ARGUMENTS = 8
    OPTIONS = 9


def mark_id(mark: Mark) -> int:
    """Return the token id of a mark."""
    return _MARK_BASE | mark


def is_mark(token_id: int) -> bool:
    """Return whether a token id is a mark."""
    return token_id & 0xFFFF_FF00 == _MARK_BASE


def new_tokens(ids: Iterable[int] = ()) -> TokenIds:
    """Return token ids as an array.

    Raises:
        OverflowError: An id is negative or does not fit into 32 bits.
    """
    return array("I", ids)


@lru_cache(maxsize=2048)
def text_tokens(text: str) -> TokenIds:
    """Return the tokens of one piece of text (cached, for conversations repeat their messages every turn)."""
    data = text.encode("utf-8", errors="replace")
    data += _PAD * (-len(data) % 4)
    ids = new_tokens()
    ids.frombytes(data)
    return ids


def text_of(ids: TokenIds) -> str:
    """Return the text of tokens; marks vanish and broken sequences become U+FFFD."""
    return _decode(_MARK_PATTERN.sub(b"", ids.tobytes()))


def split_marks(ids: TokenIds) -> list[tuple[int, str]]:
    """Return `(mark, text that follows it)` in order; text before the first mark comes under 0."""
    parts = _MARK_PATTERN.split(ids.tobytes())
    pairs = [(0, _decode(parts[0]))] if parts[0] else []
    pairs += [(mark[0], _decode(body)) for mark, body in zip(parts[1::2], parts[2::2], strict=True)]
    return pairs


def pieces(ids: Sequence[int]) -> list[str]:
    """Return the text each token adds; a character cut by a token boundary comes with its last token."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(token.to_bytes(4, "little").replace(_PAD, b"")) for token in ids]


def block_keys(ids: TokenIds, *, block_size: int, salt: str = "") -> list[int]:
    """Return the chained key of every full block: equal keys mean equal tokens from the very start.

    Args:
        ids: Prompt (and output) tokens.
        block_size: Tokens in a block.
        salt: vLLM's `cache_salt`; separates the cache of those who use different ones.
    """
    key = digest(salt) if salt else 0
    keys: list[int] = []
    for start in range(0, len(ids) - block_size + 1, block_size):
        key = hash((key, *ids[start : start + block_size]))
        keys.append(key)
    return keys


def digest(*parts: str | bytes | int) -> int:
    """Return a 63-bit number that depends on `parts` alone, the same in every process."""
    state = blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", errors="replace")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return int.from_bytes(state.digest(), "little") >> 1


def _decode(data: bytes) -> str:
    return data.replace(_PAD, b"").decode("utf-8", errors="replace")

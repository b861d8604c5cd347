"""Block keys of a conversation, made when they are read: a prompt of 16 000 tokens has a thousand of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import overload

from conserve_lab.workloads import Conversation

_BLOCKS_MAX = 1 << 24


class ConversationKeys:
    """Equal keys mean equal content and history: shared leading blocks first, then the conversation's own.

    Args:
        conversation: whose.
        number: unlike that of any other conversation of the run.
        block_size: tokens of a block.
    """

    def __init__(self, conversation: Conversation, *, number: int, block_size: int) -> None:
        self._shared = conversation.shared_tokens // block_size
        self._own = (number + 1) * _BLOCKS_MAX

    def leading(self, blocks: int) -> Sequence[int]:
        """The first `blocks` keys."""
        if not self._shared:
            return range(self._own, self._own + blocks)
        return _Joined(range(min(self._shared, blocks)), range(self._own, self._own + max(blocks - self._shared, 0)))


class _Joined(Sequence[int]):
    """Shared keys, then the conversation's own; a part of it is made as fast as a part of a range."""

    def __init__(self, shared: range, own: range) -> None:
        self._shared, self._own = shared, own

    def __len__(self) -> int:
        return len(self._shared) + len(self._own)

    def __iter__(self) -> Iterator[int]:
        return chain(self._shared, self._own)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        shared, own = self._shared, self._own
        if not isinstance(index, slice):
            return shared[index] if index < len(shared) else own[index - len(shared)]
        start, stop, _ = index.indices(len(self))
        start_own, stop_own = max(start - len(shared), 0), max(stop - len(shared), 0)
        if start >= len(shared):
            return own[start_own:stop_own]
        return _Joined(shared[start:stop], own[start_own:stop_own])

"""Block keys of a conversation, made when they are read: a prompt of 16 000 tokens has a thousand of them."""

from __future__ import annotations

from collections.abc import Sequence
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
        return _Joined(min(self._shared, blocks), range(self._own, self._own + max(blocks - self._shared, 0)))


class _Joined(Sequence[int]):
    """Shared keys 0 .. n-1, then a range."""

    def __init__(self, shared: int, own: range) -> None:
        self._shared, self._own_keys = shared, own

    def __len__(self) -> int:
        return self._shared + len(self._own_keys)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            own = self._own_keys[max(start - self._shared, 0) : max(stop - self._shared, 0)]
            return own if start >= self._shared else [*range(start, min(self._shared, stop)), *own]
        if index < self._shared:
            return index
        return self._own_keys[index - self._shared]

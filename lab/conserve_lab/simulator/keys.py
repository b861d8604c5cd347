"""Block keys of a conversation, each made once at most: a prompt of 16 000 tokens has a thousand of them."""

from __future__ import annotations

from collections.abc import Sequence

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
        self._own = (number + 1) * _BLOCKS_MAX
        self._shared = conversation.shared_tokens // block_size
        self._made = list(range(self._shared))

    def leading(self, blocks: int) -> Sequence[int]:
        """The first `blocks` keys."""
        if not self._shared:
            return range(self._own, self._own + blocks)
        made = len(self._made)
        if made < blocks:
            start = self._own - self._shared
            self._made += range(start + made, start + blocks)
        return self._made[:blocks]

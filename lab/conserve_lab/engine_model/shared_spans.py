"""Blocks that several sequences reference, a span at a time: a system prompt that all conversations share is one."""

from __future__ import annotations

from collections.abc import Iterator, KeysView


class SharedSpans:
    """Spans of blocks, in the order of their tokens; whoever references a block of one references all of it."""

    def __init__(self) -> None:
        self._span_of: dict[int, list[int]] = {}
        """By its first block."""
        self._others: dict[int, int] = {}
        """References beyond the first one, by the first block too."""

    def span_from(self, block: int) -> list[int] | None:
        """The span that begins with this block; None if none does."""
        return self._span_of.get(block)

    @property
    def starts(self) -> KeysView[int]:
        """The first blocks of all spans."""
        return self._span_of.keys()

    def add(self, blocks: list[int]) -> None:
        """Blocks that one sequence references get a second one."""
        self._span_of[blocks[0]] = blocks
        self._others[blocks[0]] = 1

    def join(self, first: int, count: int) -> None:
        """One more references the leading blocks of the span that begins with `first`."""
        span, others = self._span_of[first], self._others[first]
        if count < len(span):
            self._span_of[first], rest = span[:count], span[count:]
            self._span_of[rest[0]] = rest
            self._others[rest[0]] = others
        self._others[first] = others + 1

    def leave(self, first: int) -> int:
        """One less references the span that begins with `first`; returns how many blocks it has."""
        span = self._span_of[first]
        self._others[first] -= 1
        if not self._others[first]:
            del self._span_of[first], self._others[first]
        return len(span)

    def references(self) -> Iterator[tuple[int, int]]:
        """Each block, and how many reference it."""
        return ((block, 1 + self._others[first]) for first, span in self._span_of.items() for block in span)

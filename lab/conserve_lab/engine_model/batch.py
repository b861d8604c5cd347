"""The requests that an engine runs together."""

from __future__ import annotations

import bisect

from conserve_lab.engine_model.sequence import Sequence


class Batch:
    """Running sequences, and apart those that only decode.

    Attributes:
        running: all of them, in the order in which they came in.
        decoding: those that only decode, in order of arrival at the engine.
    """

    __slots__ = ("decoding", "running")

    def __init__(self) -> None:
        self.running: list[Sequence] = []
        self.decoding: list[Sequence] = []

    def decodes_from_now_on(self, sequence: Sequence) -> None:
        """Its prompt is computed. May be said again."""
        if sequence not in self.decoding:
            bisect.insort(self.decoding, sequence, key=lambda item: item.order)

    def leave(self, sequence: Sequence) -> None:
        """It is done, preempted or cancelled."""
        self.running.remove(sequence)
        if sequence in self.decoding:
            self.decoding.remove(sequence)

    def check(self) -> None:
        """Assert that both lists agree."""
        decoding = [sequence for sequence in self.running if sequence.decoding]
        assert sorted(decoding, key=lambda item: item.order) == self.decoding

"""What a conversation asks of engines: how many tokens come in and go out at each turn, and how long its tools take."""

from __future__ import annotations

from dataclasses import dataclass


class WorkloadError(Exception):
    """A workload cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn.

    Attributes:
        append_tokens: new input tokens; of the first turn all of its input.
        output_tokens: generated.
        gap_us: from the end of this turn to the arrival of the next one (a tool, or a human).
    """

    append_tokens: int
    output_tokens: int
    gap_us: int = 0

    def __post_init__(self) -> None:
        if self.append_tokens < 1 or self.output_tokens < 1 or self.gap_us < 0:
            raise WorkloadError(f"a turn needs at least one token in and one out, and no negative gap: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns in their order.

    Attributes:
        shared_tokens: leading tokens of the first turn that all conversations of the workload share (system, tools).
    """

    conversation_id: str
    turns: tuple[Turn, ...]
    shared_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.turns:
            raise WorkloadError(f"conversation {self.conversation_id!r} has no turns")
        if not 0 <= self.shared_tokens <= self.turns[0].append_tokens:
            raise WorkloadError(f"conversation {self.conversation_id!r} shares more than its first turn has")

    def prompt_tokens(self, turn: int) -> int:
        """Input of turn number `turn` (from 0): everything said before, and its append."""
        before = sum(earlier.append_tokens + earlier.output_tokens for earlier in self.turns[:turn])
        return before + self.turns[turn].append_tokens

    @property
    def final_tokens(self) -> int:
        """Context at the end of the last turn."""
        return self.prompt_tokens(len(self.turns) - 1) + self.turns[-1].output_tokens

    def first(self, turns: int) -> Conversation:
        """The same conversation, ended after `turns` turns."""
        return Conversation(
            conversation_id=self.conversation_id, turns=self.turns[:turns], shared_tokens=self.shared_tokens
        )

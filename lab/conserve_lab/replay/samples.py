"""What the client saw of each turn. Instants are seconds since the replay's start, on one monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class TurnSample:
    """One turn, all its attempts together.

    Attributes:
        turn: position in the conversation, from 1.
        last: whether it is the conversation's last one, whose output the user sees.
        asked_s: when its first attempt was sent.
        attempt_s: when the attempt that was answered was sent.
        first_token_s, done_s: of the attempt that was answered; None when none was.
        token_gaps_us: times between the tokens of that answer.
        prompt_tokens, completion_tokens, cached_tokens: the engine's `usage`.
        failures: when each attempt failed, and as what.
    """

    conversation_id: str
    turn: int
    last: bool
    asked_s: float
    attempt_s: float = 0.0
    first_token_s: float | None = None
    done_s: float | None = None
    token_gaps_us: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    failures: list[tuple[float, str]] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float | None:
        """From the turn's arrival, failed attempts included, to its first token."""
        return None if self.first_token_s is None else (self.first_token_s - self.asked_s) * 1000


@dataclass(slots=True, kw_only=True)
class ConversationSample:
    """One conversation.

    Attributes:
        arrived_s: when it was to begin.
        given_up: whether a turn of it was never answered.
    """

    conversation_id: str
    arrived_s: float
    turns: list[TurnSample] = field(default_factory=list)
    given_up: bool = False

    @property
    def ttfet_ms(self) -> float | None:
        """From the conversation's arrival to the first token of its last turn; None when it never got there."""
        last = self.turns[-1] if self.turns else None
        if last is None or not last.last or last.first_token_s is None:
            return None
        return (last.first_token_s - self.arrived_s) * 1000

"""Ways in which a workload can be made harder: `NAME=VALUE`, any number of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from conserve_lab.workloads.conversation import Conversation, Turn, WorkloadError
from conserve_lab.workloads.generator import Spread

GIANT = Spread(median=31_000, p90_factor=1.02)
SKEWED_SHARE = 0.1

_Change = Callable[[Conversation, float, random.Random], Conversation]


def _tools(conversation: Conversation, seconds: float, source: random.Random) -> Conversation:
    spread = Spread(median=seconds * 1000, p90_factor=2.5, most=3_600_000)
    return _each(conversation, lambda _, turn: replace(turn, gap_us=spread.draw(source) * 1000))


def _shared(conversation: Conversation, tokens: float, _: random.Random) -> Conversation:
    return replace(conversation, shared_tokens=min(round(tokens), conversation.turns[0].append_tokens))


def _giant(conversation: Conversation, share: float, source: random.Random) -> Conversation:
    def maybe(number: int, turn: Turn) -> Turn:
        return replace(turn, append_tokens=GIANT.draw(source)) if number and source.random() < share else turn

    return _each(conversation, maybe)


def _skew(conversation: Conversation, times: float, source: random.Random) -> Conversation:
    if source.random() >= SKEWED_SHARE:
        return conversation
    return _each(conversation, lambda _, turn: replace(turn, output_tokens=max(round(turn.output_tokens * times), 1)))


def _each(conversation: Conversation, change: Callable[[int, Turn], Turn]) -> Conversation:
    turns = tuple(change(number, turn) for number, turn in enumerate(conversation.turns))
    return replace(conversation, turns=turns)


_OF_CONVERSATIONS: Mapping[str, _Change] = {"tools": _tools, "shared": _shared, "giant": _giant, "skew": _skew}

VARIATIONS: Mapping[str, str] = {
    "tools": "every gap a tool of so many seconds (median, log-normal)",
    "shared": "so many leading tokens of the first turn the same for all",
    "giant": "this share of the appends 31 000 tokens",
    "skew": "one conversation in ten answers so many times longer",
    "burst": "conversations arrive so many at once",
    "fail": "an engine that decodes dies after so many seconds, and is back 30 s later with nothing",
    "drain": "an engine that decodes is drained after so many seconds, for 60 s",
}
"""By name, what their values mean. The last three are not the conversations' but the run's."""


def parse_variation(text: str) -> tuple[str, float]:
    """Split `NAME=VALUE`.

    Raises:
        WorkloadError: an unknown name, or no positive number.
    """
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if name not in VARIATIONS or not number > 0:
        raise WorkloadError(f"no variation {text!r}: write NAME=NUMBER, with one of {', '.join(VARIATIONS)}")
    return name, number


def vary(conversations: Sequence[Conversation], variations: Sequence[str], *, seed: int) -> tuple[Conversation, ...]:
    """Return the conversations with the variations that are theirs, in the order given; the same for the same seed.

    Raises:
        WorkloadError: see `parse_variation`.
    """
    found = tuple(conversations)
    for text in variations:
        name, value = parse_variation(text)
        change = _OF_CONVERSATIONS.get(name)
        if change is not None:
            source = random.Random(f"{name} {seed}")  # noqa: S311 -- a workload, not a secret
            found = tuple(change(conversation, value, source) for conversation in found)
    return found


def value_of(variations: Sequence[str], name: str) -> list[float]:
    """The values that are given for one of them."""
    return [value for known, value in map(parse_variation, variations) if known == name]

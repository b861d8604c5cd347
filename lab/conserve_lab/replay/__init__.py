"""Replays conversations of known sizes against real servers in wall time, and measures what their client sees."""

from __future__ import annotations

from conserve_lab.replay.driver import Door, Pace, Replay
from conserve_lab.replay.figures import latencies, spread_of
from conserve_lab.replay.prompts import PromptWriter, tokens_per_word
from conserve_lab.replay.samples import ConversationSample, TurnSample
from conserve_lab.replay.selection import Chosen, choose_conversations

__all__ = [
    "Chosen",
    "ConversationSample",
    "Door",
    "Pace",
    "PromptWriter",
    "Replay",
    "TurnSample",
    "choose_conversations",
    "latencies",
    "spread_of",
    "tokens_per_word",
]

"""Agents for a soak: each talks, thinks, talks on, checks every answer, and begins anew.

An answer of the emulated model is a function of the prompt, so the right one is known without asking anybody: whatever
engine, migration, failover or repetition it came through, it must be that text.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai

from conserve_lab.emulator.chat import read_chat
from conserve_lab.emulator.config import EmulatorConfig
from conserve_lab.emulator.fields import Served
from conserve_lab.emulator.language import Speaker, assemble
from conserve_sdk import ConServe, conversation

_TRIES = 8
_TRY_PAUSE_S = 1.0
_WORDS = ("ledger", "harvest", "signal", "orbit", "canvas", "meadow", "engine", "archive", "current", "island")


@dataclass(slots=True)
class Tally:
    """What agents have seen so far.

    Attributes:
        conversations: ended as planned; `lost`: given up, because a turn failed `_TRIES` times in a row.
        turns: answered; `wrong`: with another text than the model's.
        errors: exceptions that reached an agent, by kind; the turn was then asked again.
        talking: conversations under way.
        slow_ms: the longest time that any turn took, retries included.
        notes: the first few wrong answers and lost conversations, in words.
    """

    conversations: int = 0
    lost: int = 0
    turns: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    talking: int = 0
    slow_ms: float = 0.0
    turn_ms: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keep it, if it is among the first."""
        if len(self.notes) < 20:
            self.notes.append(text)


class RightAnswers:
    """What the emulated model answers.

    Args:
        config: of any engine of the fleet; all speak one language.
    """

    def __init__(self, config: EmulatorConfig) -> None:
        self._speaker = Speaker(config.language())
        self._served = Served(
            model=config.model,
            max_model_len=config.max_model_len,
            image_tokens=config.image_tokens,
            connector=False,
            stream_interval=1,
        )

    def to(self, body: dict[str, Any]) -> str:
        """The text that answers a chat request."""
        generation = read_chat(body, served=self._served, request_id="", session_id=None).generation
        return assemble(self._speaker.answer(generation.prompt, generation.wish)).content or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How agents behave.

    Attributes:
        think_s: mean pause between two turns (exponential, at most four times that).
        turns_min, turns_max: of a conversation.
        first_chars: length of the first message; later ones are short.
    """

    think_s: float
    turns_min: int = 3
    turns_max: int = 8
    first_chars: int = 3_000
    answer_tokens: int = 32


class Agent:
    """One agent, one conversation after another until it is told to stop.

    Args:
        number: names its conversations and seeds its choices.
        goes_on: whether to begin another conversation.
    """

    def __init__(
        self,
        number: int,
        *,
        conserve: ConServe,
        client: openai.AsyncOpenAI,
        model: str,
        right: RightAnswers,
        habits: Habits,
        tally: Tally,
        goes_on: Callable[[], bool],
    ) -> None:
        self._number = number
        self._conserve = conserve
        self._client = client
        self._model = model
        self._right = right
        self._habits = habits
        self._tally = tally
        self._goes_on = goes_on
        self._random = random.Random(number)  # noqa: S311  # a workload, no secret

    async def run(self) -> None:
        """Live."""
        await asyncio.sleep(self._random.uniform(0, self._habits.think_s))  # not all at once
        serial = 0
        while self._goes_on():
            serial += 1
            name = f"soak-{self._number}-{serial}"
            self._tally.talking += 1
            try:
                with conversation(name):
                    whole = await self._converse(name)
            finally:
                self._tally.talking -= 1
            if whole:
                self._tally.conversations += 1
            else:
                self._tally.lost += 1
            await self._conserve.arelease(name)

    async def _converse(self, name: str) -> bool:
        habits = self._habits
        messages = [{"role": "user", "content": self._words(habits.first_chars, opening=name)}]
        for turn in range(self._random.randint(habits.turns_min, habits.turns_max)):
            if turn:
                await asyncio.sleep(min(self._random.expovariate(1 / habits.think_s), 4 * habits.think_s))
                messages.append({"role": "user", "content": self._words(60, opening=f"turn {turn}")})
            answer = await self._turn(name, messages)
            if answer is None:
                return False
            messages.append({"role": "assistant", "content": answer})
        return True

    async def _turn(self, name: str, messages: list[dict[str, str]]) -> str | None:
        body = {"model": self._model, "messages": messages, "max_tokens": self._habits.answer_tokens}
        stream = self._random.random() < 0.5
        began_s = time.perf_counter()
        for _ in range(_TRIES):
            try:
                answer = await self._asked(body, stream=stream)
                break
            except openai.OpenAIError as error:
                self._tally.errors[f"{type(error).__name__}{' in a stream' if stream else ''}"] += 1
                self._tally.note(f"{name}, message {len(messages)}: {type(error).__name__}: {str(error)[:200]}")
                await asyncio.sleep(_TRY_PAUSE_S)
        else:
            return None
        self._tally.turn_ms.append((time.perf_counter() - began_s) * 1_000)
        self._tally.turns += 1
        if answer != self._right.to(body):
            self._tally.wrong += 1
            self._tally.note(f"{name}, message {len(messages)}: wrong answer {answer[:80]!r}")
        return answer

    async def _asked(self, body: dict[str, Any], *, stream: bool) -> str:
        if not stream:
            whole = await self._client.chat.completions.create(**body)
            return whole.choices[0].message.content or ""
        parts: list[str] = []
        async with await self._client.chat.completions.create(**body, stream=True) as chunks:
            async for chunk in chunks:
                parts += [choice.delta.content or "" for choice in chunk.choices]
        return "".join(parts)

    def _words(self, chars: int, *, opening: str) -> str:
        words = [opening]
        length = len(opening)
        while length < chars:
            words.append(self._random.choice(_WORDS))
            length += len(words[-1]) + 1
        return " ".join(words)

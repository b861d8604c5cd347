"""Plays conversations in wall time: each waits for its answer before it goes on, as an agent does.

The client is a plain HTTP one that streams, so that it costs little beside what is measured and retries nothing: an
attempt that fails is counted, and the turn is asked again after a while, as an agent's framework would.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai

from conserve_lab.replay.prompts import PromptWriter
from conserve_lab.replay.samples import ConversationSample, TurnSample
from conserve_lab.workloads import Conversation


async def _nothing(_conversation_id: str) -> None:
    """End nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """One way to the engines.

    Attributes:
        client: makes the requests; its base URL is that of the API, `/v1` included.
        model: the model's name in them.
        inside: the context of one conversation's calls.
        headers: further headers of its calls.
        finish: tells whoever must know that a conversation is over.
        token_ids: ask for the ids of tokens, so that those are seen which show no text.
    """

    client: httpx2.AsyncClient
    model: str
    inside: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext()
    headers: Callable[[str], Mapping[str, str]] = lambda _: {}
    finish: Callable[[str], Awaitable[object]] = _nothing
    token_ids: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How the conversations follow each other.

    Attributes:
        arrivals_us: when each of them begins, after the start.
        gap_scale: multiplies the trace's tool times.
        retry_s: from a failed attempt to the next.
        give_up_s: a turn that has failed for so long ends its conversation.
    """

    arrivals_us: Sequence[int]
    gap_scale: float = 1.0
    retry_s: float = 1.0
    give_up_s: float = 60.0


@dataclass(slots=True)
class Replay:
    """One replay. Read `conversations` while it runs or afterwards.

    Attributes:
        on_turn: called after every turn, answered or given up.
    """

    door: Door
    pace: Pace
    writer: PromptWriter
    on_turn: Callable[[TurnSample], object] = lambda _: None
    conversations: list[ConversationSample] = field(default_factory=list)
    started_s: float = 0.0

    async def run(self, trace: Sequence[Conversation]) -> list[ConversationSample]:
        """Play all conversations and return what was seen of them, in the trace's order."""
        self.started_s = time.monotonic()
        self.conversations = [
            ConversationSample(conversation_id=given.conversation_id, arrived_s=arrival_us / 1_000_000)
            for given, arrival_us in zip(trace, self.pace.arrivals_us, strict=True)
        ]
        async with asyncio.TaskGroup() as group:
            for given, sample in zip(trace, self.conversations, strict=True):
                group.create_task(self._converse(given, sample))
        return self.conversations

    def now_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_s

    async def _converse(self, given: Conversation, sample: ConversationSample) -> None:
        await asyncio.sleep(max(0.0, sample.arrived_s - self.now_s()))
        messages: list[Any] = []
        for number, turn in enumerate(given.turns, start=1):
            messages += self._said_before(given, number)
            last = number == len(given.turns)
            seen = TurnSample(conversation_id=given.conversation_id, turn=number, last=last, asked_s=self.now_s())
            sample.turns.append(seen)
            answer = await self._until_answered(seen, messages, output_tokens=turn.output_tokens)
            self.on_turn(seen)
            if answer is None:
                sample.given_up = True
                break
            messages.append({"role": "assistant", "content": answer})
            await asyncio.sleep(0 if last else turn.gap_us / 1_000_000 * self.pace.gap_scale)
        await self.door.finish(given.conversation_id)

    def _said_before(self, given: Conversation, number: int) -> list[dict[str, str]]:
        """What the user, or a tool, has said since the last answer."""
        tokens = given.turns[number - 1].append_tokens
        own = self.writer.text(f"{given.conversation_id} {number}", tokens=tokens)
        if number > 1 or not given.shared_tokens:
            return [{"role": "user", "content": own}]
        shared = self.writer.text("all", tokens=given.shared_tokens)
        rest = max(tokens - given.shared_tokens, 1)
        own = self.writer.text(f"{given.conversation_id} 1", tokens=rest)
        return [{"role": "system", "content": shared}, {"role": "user", "content": own}]

    async def _until_answered(self, seen: TurnSample, messages: list[Any], *, output_tokens: int) -> str | None:
        while True:
            seen.attempt_s = self.now_s()
            seen.first_token_s, seen.token_gaps_us = None, []
            try:
                return await self._ask(seen, messages, output_tokens=output_tokens)
            except (openai.OpenAIError, httpx2.TransportError, _Refused) as error:
                seen.first_token_s = None
                seen.failures.append(
                    (self.now_s(), str(error) if isinstance(error, _Refused) else type(error).__name__)
                )
                if self.now_s() - seen.asked_s > self.pace.give_up_s:
                    return None
                await asyncio.sleep(self.pace.retry_s)

    async def _ask(self, seen: TurnSample, messages: list[Any], *, output_tokens: int) -> str:
        body = {
            "model": self.door.model,
            "messages": messages,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            **({"return_token_ids": True} if self.door.token_ids else {}),
        }
        headers = dict(self.door.headers(seen.conversation_id))
        reader = _AnswerReader(seen)
        with self.door.inside(seen.conversation_id):
            async with self.door.client.stream("POST", "chat/completions", json=body, headers=headers) as answer:
                if answer.status_code != httpx2.codes.OK:
                    raise _Refused(f"HTTP {answer.status_code}")
                async for event in _events(answer):
                    reader.take(event, now_s=self.now_s())
        if not reader.finished:
            raise _Refused("the stream ended before the answer did")
        seen.done_s = self.now_s()
        if seen.first_token_s is None:  # an answer of tokens that show no text
            seen.first_token_s = seen.done_s
        return "".join(reader.said)


class _Refused(Exception):  # noqa: N818 -- an attempt's end, not an error of ours
    """The attempt was answered, but not with an answer."""


class _AnswerReader:
    """Reads the chunks of one streamed answer into its sample."""

    def __init__(self, seen: TurnSample) -> None:
        self._seen = seen
        self._before_s = 0.0
        self.said: list[str] = []
        self.finished = False

    def take(self, event: bytes, *, now_s: float) -> None:
        """Read one server-sent event."""
        if not event.startswith(b"data: {"):
            return
        chunk = json.loads(event[len(b"data: ") :])
        if "error" in chunk:
            raise _Refused("an error in the stream")
        if usage := chunk.get("usage"):
            _note_usage(self._seen, usage)
        for choice in chunk["choices"]:
            self.finished = self.finished or choice["finish_reason"] is not None
            text = choice["delta"].get("content") or ""
            if text or choice.get("token_ids"):
                self._note_token(text, now_s)

    def _note_token(self, text: str, now_s: float) -> None:
        self.said.append(text)
        if self._seen.first_token_s is None:
            self._seen.first_token_s = now_s
        else:
            self._seen.token_gaps_us.append(round((now_s - self._before_s) * 1_000_000))
        self._before_s = now_s


async def _events(answer: httpx2.Response) -> AsyncIterator[bytes]:
    left = b""
    async for part in answer.aiter_bytes():
        *events, left = (left + part).split(b"\n\n")
        for event in events:
            yield event


def _note_usage(seen: TurnSample, usage: Mapping[str, Any]) -> None:
    seen.prompt_tokens, seen.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    seen.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

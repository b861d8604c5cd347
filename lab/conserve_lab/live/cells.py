"""Measures the cells that a calibration needs at an engine that runs: prefills alone, and decodes side by side."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx2

from conserve_lab.calibration import Cells, DecodeCell, PrefillCell
from conserve_lab.live.thin_client import TimedStream, stream_tokens
from conserve_lab.replay.prompts import WORDS, PromptWriter, tokens_per_word


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What to measure.

    Attributes:
        prefill_tokens: prompt lengths, each alone on the engine.
        sequences: how many decode at once ...
        context_tokens: ... each with a prompt of so many tokens; every pair is a cell.
        output_tokens: of each of them.
        repetitions: of every cell, in rounds over all of them; the median counts.
    """

    prefill_tokens: tuple[int, ...] = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144)
    sequences: tuple[int, ...] = (1, 2, 4, 8, 16)
    context_tokens: tuple[int, ...] = (128, 512, 1024, 2048)
    output_tokens: int = 192
    repetitions: int = 5

    def within(self, context_tokens_max: int) -> Grid:
        """The part of it that an engine with so much context can run."""
        most = context_tokens_max - self.output_tokens if context_tokens_max else max(self.prefill_tokens)
        return Grid(
            prefill_tokens=tuple(tokens for tokens in self.prefill_tokens if tokens <= most),
            sequences=self.sequences,
            context_tokens=tuple(tokens for tokens in self.context_tokens if tokens <= most),
            output_tokens=self.output_tokens,
            repetitions=self.repetitions,
        )

    @property
    def measurements(self) -> int:
        """How many there are to do."""
        cells = len(self.prefill_tokens) + len(self.sequences) * len(self.context_tokens)
        return self.repetitions * cells + (self.repetitions + 1) * len(self.front_tokens)

    @property
    def front_tokens(self) -> tuple[int, ...]:
        """Lengths of chats whose way to the first step is measured: every other prefill length."""
        return self.prefill_tokens[::2]


@dataclass(frozen=True, slots=True)
class FrontCell:
    """Time to the first token of a chat whose prompt is in the engine's cache."""

    prompt_tokens: int
    first_token_us: int


class CellMeter:
    """Measures cells of one engine.

    Args:
        url: of the engine, without `/v1`.
        model: the model's name there.
        token_ids: ids to make prompts of.
    """

    def __init__(self, url: str, *, model: str, token_ids: list[int]) -> None:
        self._url = url
        self._model = model
        self._ids = token_ids
        self._draw = random.Random(7)  # noqa: S311 -- prompts, not secrets

    async def measure(self, grid: Grid, *, max_num_batched_tokens: int, on_cell: Callable[[], object]) -> Cells:
        """Measure all cells of a grid.

        Raises:
            StreamFailed: the engine refused a request or ended one early.
            OSError: it cannot be reached.
        """
        prefill: dict[int, list[int]] = {tokens: [] for tokens in grid.prefill_tokens}
        pairs = [(count, tokens) for count in grid.sequences for tokens in grid.context_tokens]
        decode: dict[tuple[int, int], list[DecodeCell]] = {pair: [] for pair in pairs}
        await self._stream(64, 4)  # a warm engine
        for _ in range(grid.repetitions):
            for tokens in grid.prefill_tokens:
                prefill[tokens].append((await self._stream(tokens, 1)).ttft_us)
                on_cell()
            for count, tokens in pairs:
                decode[count, tokens].append(await self._decode(count, tokens, grid.output_tokens))
                on_cell()
        return Cells(
            source=f"measured over HTTP, median of {grid.repetitions}",
            engine=f"{self._model} at {self._url}",
            max_num_batched_tokens=max_num_batched_tokens,
            decode=tuple(_median_cell(cells) for cells in decode.values()),
            prefill=tuple(
                PrefillCell(prompt_tokens=tokens, first_token_us=round(statistics.median(times)))
                for tokens, times in prefill.items()
            ),
        )

    async def _stream(self, prompt_tokens: int, output_tokens: int) -> TimedStream:
        prompt = self._draw.choices(self._ids, k=prompt_tokens)
        return await stream_tokens(self._url, model=self._model, prompt=prompt, output_tokens=output_tokens)

    async def _decode(self, count: int, prompt_tokens: int, output_tokens: int) -> DecodeCell:
        """Time between tokens of sequences that decode side by side.

        From the last first token to the last token of all: an engine that puts tokens together changes neither. Some of
        the sequences began a few steps before, and so end a few before.
        """
        streams = await asyncio.gather(*(self._stream(prompt_tokens, output_tokens) for _ in range(count)))
        start_s = max(stream.tokens_s[0] for stream in streams)
        end_s = max(stream.tokens_s[-1] for stream in streams)
        return DecodeCell(
            sequences=count,
            context_tokens=count * (prompt_tokens + output_tokens // 2),
            step_us=max(round((end_s - start_s) * 1_000_000 / (output_tokens - 1)), 1),
        )

    async def fronts(
        self, lengths: Sequence[int], *, repetitions: int, on_cell: Callable[[], object]
    ) -> list[FrontCell]:
        """Time to the first token of chats that the engine has in its cache: what comes before the first step.

        Raises:
            httpx2.HTTPError: the engine refused a chat, or cannot be reached.
        """
        writer = PromptWriter(tokens_per_word=await tokens_per_word(self._url, model=self._model), salt="front")
        found: list[FrontCell] = []
        async with httpx2.AsyncClient(base_url=f"{self._url}/v1", timeout=600.0, trust_env=False) as http:
            for tokens in lengths:
                text = writer.text(str(tokens), tokens=tokens)
                body = {
                    "model": self._model,
                    "messages": [{"role": "user", "content": text}],
                    "max_tokens": 1,
                    "temperature": 0,
                }
                times_us: list[int] = []
                for _ in range(repetitions + 1):  # the first one is not in the cache yet
                    sent_s = time.monotonic()
                    answer = (await http.post("chat/completions", json=body)).raise_for_status()
                    times_us.append(round((time.monotonic() - sent_s) * 1_000_000))
                    on_cell()
                prompt_tokens = int(answer.json()["usage"]["prompt_tokens"])
                found.append(FrontCell(prompt_tokens, round(statistics.median(times_us[1:]))))
        return found


async def known_tokens(url: str, *, model: str) -> list[int]:
    """Return ids of tokens of ordinary words, as an engine's tokenizer gives them.

    Args:
        url: of the engine, without `/v1`.
        model: the model's name there.

    Raises:
        httpx2.HTTPError: the engine does not answer, or has no `/tokenize`.
    """
    async with httpx2.AsyncClient(timeout=30.0, trust_env=False) as http:
        body = {"model": model, "prompt": " ".join(WORDS), "add_special_tokens": False}
        answer = await http.post(f"{url}/tokenize", json=body)
    return sorted(set(answer.raise_for_status().json()["tokens"]))


def _median_cell(cells: list[DecodeCell]) -> DecodeCell:
    return sorted(cells, key=lambda cell: cell.step_us)[len(cells) // 2]

"""Text of a wanted number of tokens, different wherever it must not be found in a cache."""

from __future__ import annotations

import random

import httpx2

WORDS = ("read", "file", "count", "word", "edit", "line", "list", "return", "result", "user", "table", "query", "error")
_SAMPLE_WORDS = 600


class PromptWriter:
    """Writes prompts for one tokenizer.

    Args:
        tokens_per_word: how many tokens a word of `WORDS` is on average.
        salt: stands first in all that is written, so that prompts of two replays share no block.
    """

    def __init__(self, *, tokens_per_word: float, salt: str) -> None:
        self._words_per_token = 1 / tokens_per_word
        self._salt = salt

    def text(self, name: str, *, tokens: int) -> str:
        """Return text of about so many tokens, the same for the same name."""
        draw = random.Random(f"{self._salt} {name}")  # noqa: S311 -- words, not a secret
        opening = f"{self._salt} {name}:".split()
        count = max(round(tokens * self._words_per_token) - len(opening), 1)
        return " ".join([*opening, *draw.choices(WORDS, k=count)])


async def tokens_per_word(url: str, *, model: str) -> float:
    """Ask an engine's `/tokenize` how many tokens a word is.

    Args:
        url: of the engine, without `/v1`.
        model: the model's name there.

    Raises:
        httpx2.HTTPError: the engine does not answer, or has no such route.
    """
    sample = " ".join(random.Random(0).choices(WORDS, k=_SAMPLE_WORDS))  # noqa: S311 -- words, not a secret
    async with httpx2.AsyncClient(timeout=30.0, trust_env=False) as http:
        answer = await http.post(
            f"{url}/tokenize", json={"model": model, "prompt": sample, "add_special_tokens": False}
        )
    return int(answer.raise_for_status().json()["count"]) / _SAMPLE_WORDS

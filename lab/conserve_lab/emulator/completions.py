"""`/v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from conserve_lab.emulator.chat import answer_form
from conserve_lab.emulator.errors import ApiError
from conserve_lab.emulator.fields import (
    Body,
    Served,
    check_model,
    check_stream_options,
    kv_params,
    sampling,
    token_limit,
    usage,
)
from conserve_lab.emulator.generation import Choice, Generation, KvAnswer, Run, Update
from conserve_lab.emulator.http import DONE, sse
from conserve_lab.emulator.kv_params import read_kv_wish, take_prompt_token_ids
from conserve_lab.emulator.language import TokenIds, assemble, text_of, text_tokens
from conserve_lab.emulator.language.tokens import new_tokens

_MAX_TOKENS_DEFAULT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionCall:
    """One completion request: what to generate and how to show it."""

    generation: Generation
    model: str
    served: Served
    created: int
    include_usage: bool
    echo: bool
    return_token_ids: bool

    def document(self, run: Run, kv_answer: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the whole answer."""
        return {
            **self._head(),
            "choices": [self._choice(choice) for choice in run.choices],
            "usage": usage(run.prompt_tokens, run.completion_tokens, run.cached_tokens),
            "kv_transfer_params": kv_answer,
        }

    async def events(self, run: Run, _kv_answer: KvAnswer) -> AsyncIterator[bytes]:
        """Yield the answer's chunks. `kv_transfer_params` never appear in them, as in vLLM."""
        async for updates in run.updates(interval=self.served.stream_interval):
            for update in updates:
                yield sse({**self._head(), "choices": [self._piece(update)]})
        if self.include_usage:
            counts = usage(run.prompt_tokens, run.completion_tokens, run.cached_tokens)
            yield sse({**self._head(), "choices": [], "usage": counts})
        yield DONE

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.generation.request_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        entry = {
            "index": choice.index,
            "text": self._echoed() + assemble(choice.answer).content,
            "logprobs": None,
            "finish_reason": choice.answer.finish_reason,
            "stop_reason": choice.answer.stop_reason,
        }
        if self.return_token_ids:
            entry["prompt_token_ids"] = list(self.generation.prompt)
            entry["token_ids"] = list(choice.answer.token_ids)
        return entry

    def _piece(self, update: Update) -> dict[str, Any]:
        answer = update.choice.answer
        shown = [delta.content for delta in answer.deltas[update.start : update.end] if delta]
        entry: dict[str, Any] = {
            "index": update.choice.index,
            "text": ("" if update.start else self._echoed()) + "".join(shown),
            "logprobs": None,
            "finish_reason": answer.finish_reason if update.last else None,
            "stop_reason": answer.stop_reason if update.last else None,
        }
        if self.return_token_ids:
            entry["token_ids"] = list(answer.token_ids[update.start : update.end])
            if not update.start:
                entry["prompt_token_ids"] = list(self.generation.prompt)
        return entry

    def _echoed(self) -> str:
        return text_of(self.generation.prompt) if self.echo else ""


def read_completion(body: Body, *, served: Served, request_id: str, session_id: str | None) -> CompletionCall:
    """Read a completion request.

    Raises:
        ApiError: It is not one that vLLM would accept.
    """
    model = check_model(body, served)
    options = check_stream_options(body)
    params = kv_params(body, served)
    echo = bool(body.get("echo"))
    forwarded = take_prompt_token_ids(params)
    prompt = forwarded if forwarded is not None and not echo else _prompt(body.get("prompt"))
    shared = sampling(body)
    limited = body if body.get("max_tokens") is not None else {**body, "max_tokens": _MAX_TOKENS_DEFAULT}
    limit = token_limit(limited, ("max_tokens",), prompt_tokens=len(prompt), max_model_len=served.max_model_len)
    schema, choices = answer_form(body)
    generation = Generation(
        request_id=f"cmpl-{request_id}",
        route="completions",
        prompt=prompt,
        wish=shared.wish(max_tokens=limit, tool_choice="none", answer_schema=schema, choices=choices),
        n=shared.n,
        stream=bool(body.get("stream")),
        kv=read_kv_wish(params),
        cache_salt=str(body.get("cache_salt") or ""),
        session_id=session_id,
    )
    return CompletionCall(
        generation=generation,
        model=model,
        served=served,
        created=int(time.time()),
        include_usage=bool(options.get("include_usage")),
        echo=echo,
        return_token_ids=bool(body.get("return_token_ids")),
    )


def _prompt(prompt: object) -> TokenIds:
    """Return the tokens of a prompt given as text or token ids, alone or as a list of one."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return text_tokens(prompt)
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        try:
            return new_tokens(prompt)
        except OverflowError as error:
            raise ApiError("a prompt token id is out of vocabulary", param="prompt") from error
    raise ApiError(
        "prompt must be one non-empty text or list of token ids; send several prompts as several requests",
        param="prompt",
    )

"""Does a fitted engine predict the turns of conversations? Each turn's TTFT, foreseen beside measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from conserve_lab.calibration import FittedEngine
from conserve_lab.calibration.virtual import Foreseen, foresee
from conserve_lab.engine_model import EngineModelConfig, EngineRequest
from conserve_lab.live.cells import FrontCell
from conserve_lab.replay import (
    ConversationSample,
    Door,
    Pace,
    PromptWriter,
    Replay,
    TurnSample,
    tokens_per_word,
)
from conserve_lab.vllm.counters import EngineCounters
from conserve_lab.workloads import Conversation, poisson_arrivals
from conserve_sdk.telemetry import percentile

_ANSWER_BUDGET_S = 600.0

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What a chat takes before its first step: HTTP, template, tokenizer.

    A prompt of token ids goes without the last two, so cells of those say nothing about them.
    """

    base_us: int
    ns_per_token: int

    def us(self, prompt_tokens: int) -> int:
        """For a prompt of so many tokens."""
        return self.base_us + self.ns_per_token * prompt_tokens // 1000


def fit_front(cells: Sequence[FrontCell], fitted: FittedEngine) -> Front:
    """Fit a line to cached chats, less the one step that each of them takes."""
    step_us = fitted.cost.step_us(decodes=0, context_tokens=0, prefill_tokens=1)
    slope, base = statistics.linear_regression(
        [cell.prompt_tokens for cell in cells], [max(cell.first_token_us - step_us, 0) for cell in cells]
    )
    return Front(base_us=max(round(base), 0), ns_per_token=max(round(slope * 1000), 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """One turn: what was measured of it, and what the model says."""

    conversation_id: str
    turn: int
    prompt_tokens: int
    cached_tokens: int
    cached_tokens_foreseen: int
    measured_us: int
    foreseen_us: int

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.foreseen_us / self.measured_us - 1


async def replay_on(
    url: str, *, model: str, trace: Sequence[Conversation], per_s: float, seed: int, on_turn: Callable[[], object]
) -> list[ConversationSample]:
    """Replay conversations at one engine, without anything in between.

    Raises:
        httpx2.HTTPError: the engine has no `/tokenize`.
    """
    writer = PromptWriter(tokens_per_word=await tokens_per_word(url, model=model), salt=f"calibrate-{seed}")
    arrivals = tuple(poisson_arrivals(len(trace), per_s=per_s, seed=seed))
    async with httpx2.AsyncClient(base_url=f"{url}/v1", timeout=_ANSWER_BUDGET_S, trust_env=False) as client:
        door = Door(client=client, model=model, token_ids=True)
        replay = Replay(
            door=door, pace=Pace(arrivals_us=arrivals, give_up_s=0.0), writer=writer, on_turn=lambda _: on_turn()
        )
        return await replay.run(trace)


def predicted_turns(
    fitted: FittedEngine,
    front: Front,
    seen: Sequence[ConversationSample],
    trace: Sequence[Conversation],
    *,
    counters: EngineCounters,
    max_num_batched_tokens: int,
    max_num_seqs: int,
) -> list[Predicted]:
    """Give the measured turns, at the instants they were asked, to the fitted model.

    Args:
        fitted: the engine's speeds.
        front: what a chat takes before its first step.
        seen: what was measured; turns without an answer are left out.
        trace: the conversations, in the same order.
        counters: tell the size of its KV cache and of a block.
        max_num_batched_tokens: of the engine.
        max_num_seqs: of the engine.
    """
    block = counters.block_size_tokens or 16
    config = EngineModelConfig(
        block_size=block,
        kv_blocks=max(counters.kv_capacity_tokens // block, 1),
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        cost=fitted.cost,
    )
    turns = [
        (turn, given.shared_tokens)
        for sample, given in zip(seen, trace, strict=True)
        for turn in sample.turns
        if turn.done_s is not None
    ]
    requests = [
        (round(turn.attempt_s * 1_000_000) + front.us(turn.prompt_tokens), _request(turn, shared, block=block))
        for turn, shared in turns
    ]
    foreseen = foresee(config, requests)
    return [_predicted(turn, each, front) for (turn, _), each in zip(turns, foreseen, strict=True)]


def summary(predicted: Sequence[Predicted]) -> Figures:
    """Return how far the predictions are off: of all turns, of first turns and of follow-ups."""
    groups = {
        "all": predicted,
        "first_turns": [each for each in predicted if each.turn == 1],
        "follow_ups": [each for each in predicted if each.turn > 1],
    }
    return {name: _errors(members) for name, members in groups.items() if members}


def _errors(predicted: Sequence[Predicted]) -> Figures:
    sizes = [abs(each.error) for each in predicted]
    measured, foreseen = ([each.measured_us for each in predicted], [each.foreseen_us for each in predicted])
    return {
        "turns": len(predicted),
        "median_error": round(statistics.median(each.error for each in predicted), 4),
        "abs_p50": round(statistics.median(sizes), 4),
        "abs_p90": round(percentile(sizes, 90) or 0.0, 4),
        "measured_ms": {f"p{q}": round((percentile(measured, q) or 0) / 1000, 1) for q in (50, 95)},
        "foreseen_ms": {f"p{q}": round((percentile(foreseen, q) or 0) / 1000, 1) for q in (50, 95)},
    }


def _request(turn: TurnSample, shared_tokens: int, *, block: int) -> EngineRequest:
    """The turn as the model knows it: blocks of one conversation are its own, but for those that all share."""
    tokens = turn.prompt_tokens + turn.completion_tokens
    keys = [
        hash(("shared" if (index + 1) * block <= shared_tokens else turn.conversation_id, index))
        for index in range(tokens // block)
    ]
    return EngineRequest(
        request_id=f"{turn.conversation_id}/{turn.turn}",
        prompt_tokens=max(turn.prompt_tokens, 1),
        output_tokens=max(turn.completion_tokens, 1),
        block_keys=keys,
    )


def _predicted(turn: TurnSample, foreseen: Foreseen, front: Front) -> Predicted:
    assert turn.first_token_s is not None
    return Predicted(
        conversation_id=turn.conversation_id,
        turn=turn.turn,
        prompt_tokens=turn.prompt_tokens,
        cached_tokens=turn.cached_tokens,
        cached_tokens_foreseen=foreseen.sources.local_cache_hit if foreseen.sources else 0,
        measured_us=round((turn.first_token_s - turn.attempt_s) * 1_000_000),
        foreseen_us=foreseen.ttft_us + front.us(turn.prompt_tokens),
    )

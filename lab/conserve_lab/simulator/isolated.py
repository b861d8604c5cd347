"""How fast a conversation would be with an engine of its own: the yardstick that times are divided by."""

from __future__ import annotations

from conserve_lab.hardware import EngineKind
from conserve_lab.workloads import Conversation


def isolated_ttfet_us(conversation: Conversation, kind: EngineKind, *, chunk_tokens: int, block_size: int) -> int:
    """Return the time from arrival to the first token of the last turn on an empty engine that does both.

    Equal to a simulation of the conversation alone, which a test holds it to.

    Args:
        conversation: the conversation.
        kind: of the engine.
        chunk_tokens: its `max_num_batched_tokens`.
        block_size: of its KV cache: a turn finds whole blocks of what came before.
    """
    total_us = 0
    last = len(conversation.turns) - 1
    for number, turn in enumerate(conversation.turns):
        prompt = conversation.prompt_tokens(number)
        # The last generated token of a turn is never computed before the next turn brings it as input.
        known = (
            conversation.prompt_tokens(number - 1) + conversation.turns[number - 1].output_tokens - 1 if number else 0
        )
        cached = min(known, prompt - 1) // block_size * block_size
        total_us += kind.front_us + _prefill_us(kind, cached, prompt, chunk_tokens)
        if number < last:
            total_us += _decode_us(kind, prompt, turn.output_tokens - 1) + turn.gap_us
    return total_us


def _prefill_us(kind: EngineKind, cached: int, prompt: int, chunk_tokens: int) -> int:
    total_us, done = 0, cached
    while done < prompt:
        tokens = min(chunk_tokens, prompt - done)
        pairs = tokens * (2 * done + tokens) // 2
        total_us += kind.cost.step_us(decodes=0, context_tokens=0, prefill_tokens=tokens, prefill_pairs=pairs)
        done += tokens
    return total_us


def _decode_us(kind: EngineKind, context: int, steps: int) -> int:
    return sum(kind.cost.step_us(decodes=1, context_tokens=context + step, prefill_tokens=0) for step in range(steps))

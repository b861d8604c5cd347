"""How fast a conversation would be with an engine of its own: the yardstick that times are divided by."""

from __future__ import annotations

from dataclasses import dataclass

from conserve_lab.hardware import EngineKind
from conserve_lab.workloads import Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolated:
    """One conversation on an empty engine that does both, in microseconds.

    Attributes:
        ttfet_us: arrival to the first token of the last turn.
        e2e_us: arrival to its last token.
        tbt_us: mean time between the tokens of the last turn; of one that has only one, a step.
    """

    ttfet_us: int
    e2e_us: int
    tbt_us: int


def isolated(conversation: Conversation, kind: EngineKind, *, chunk_tokens: int, block_size: int) -> Isolated:
    """Work out the yardstick. Equal to a simulation of the conversation alone, which a test holds it to.

    Args:
        conversation: the conversation.
        kind: of the engine.
        chunk_tokens: its `max_num_batched_tokens`.
        block_size: of its KV cache: a turn finds whole blocks of what came before.
    """
    total_us = known = prompt = 0
    last = conversation.turns[-1]
    for number, turn in enumerate(conversation.turns):
        prompt = conversation.prompt_tokens(number)
        cached = min(known, prompt - 1) // block_size * block_size
        total_us += kind.front_us + _prefill_us(kind, cached, prompt, chunk_tokens)
        if number < len(conversation.turns) - 1:
            total_us += _decode_us(kind, prompt, turn.output_tokens - 1) + turn.gap_us
        # The last generated token of a turn is not computed before the next turn brings it as input.
        known = prompt + turn.output_tokens - 1
    steps = last.output_tokens - 1
    decode_us = _decode_us(kind, prompt, steps)
    tbt_us = decode_us // steps if steps else _decode_us(kind, prompt, 1)
    return Isolated(ttfet_us=total_us, e2e_us=total_us + decode_us, tbt_us=tbt_us)


def _prefill_us(kind: EngineKind, cached: int, prompt: int, chunk_tokens: int) -> int:
    total_us, done = 0, cached
    while done < prompt:
        tokens = min(chunk_tokens, prompt - done)
        pairs = tokens * (2 * done + tokens) // 2
        total_us += kind.cost.step_us(decodes=0, context_tokens=0, prefill_tokens=tokens, prefill_pairs=pairs)
        done += tokens
    return total_us


def _decode_us(kind: EngineKind, context: int, steps: int) -> int:
    return sum(kind.cost.decode_steps_us(decodes=1, context_tokens=context, steps=steps, within_us=1 << 60))

"""Where a fleet is full: the arrival rate at which engines that do both would never rest."""

from __future__ import annotations

from collections.abc import Sequence

from conserve_lab.hardware import EngineKind
from conserve_lab.workloads import Conversation

_MILLION = 1_000_000


def saturation_per_s(conversations: Sequence[Conversation], kind: EngineKind, *, engines: int) -> float:
    """Return the conversations a second that so many engines can take for ever.

    What a conversation costs an engine: the prefill of everything new (a shared preamble is cached), and its tokens'
    share of steps in a batch that fills the KV cache. Gaps cost nothing here, so with slow tools a fleet without room
    for idle KV fills up earlier; no placement takes more.
    """
    cost, costs_us = kind.cost, 0.0
    contexts = [context for each in conversations for context, _ in _decodes(each)]
    batch = max(kind.kv_tokens * len(contexts) // max(sum(contexts), 1), 1)
    for conversation in conversations:
        for number, turn in enumerate(conversation.turns):
            new = turn.append_tokens - (0 if number else conversation.shared_tokens)
            done = conversation.prompt_tokens(number) - new
            costs_us += new * _MILLION / cost.prefill_tokens_per_s
            costs_us += cost.prefill_attention_ps_per_pair * new * (2 * done + new) / 2 / _MILLION
        for context, tokens in _decodes(conversation):
            step_us = max(cost.floor_us, cost.base_us + cost.decode_ns_per_context_token * context * batch / 1000)
            costs_us += tokens * (step_us / batch + cost.decode_us_per_sequence)
    return engines * len(conversations) * _MILLION / costs_us


def _decodes(conversation: Conversation) -> list[tuple[float, int]]:
    """Per turn the mean context of its steps, and how many they are."""
    return [
        (conversation.prompt_tokens(number) + turn.output_tokens / 2, turn.output_tokens)
        for number, turn in enumerate(conversation.turns)
    ]

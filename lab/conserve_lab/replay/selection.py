"""Which conversations of a trace are replayed, cut to what the engines can hold and the time there is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from conserve_lab.workloads import SHAPES, Conversation, WorkloadError, generate, load_conversations


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Conversations to replay.

    Attributes:
        trace: the file or the shape that they are from.
        cut: how many lost turns that no engine could hold, or that were beyond the limit of turns.
        passed_over: how many could not be replayed at all, because their first turn fits nowhere.
    """

    trace: str
    conversations: tuple[Conversation, ...]
    cut: int
    passed_over: int


def choose_conversations(
    trace: str, *, count: int, turns_max: int, output_tokens_max: int, context_tokens_max: int, seed: int
) -> Chosen:
    """Take the first conversations of a trace file, or generate them.

    Args:
        trace: a file that `load_conversations` reads, or the name of a generated shape.
        count: how many are wanted; a shorter trace gives fewer.
        turns_max: conversations end after so many turns; 0: never.
        output_tokens_max: longer answers are cut; 0: never.
        context_tokens_max: longest prompt plus answer that the engines take; 0: any.
        seed: of a generated shape.

    Raises:
        WorkloadError: there is no such trace, or none of its conversations fits.
        OSError: the file cannot be read.
    """
    offered = _offered(trace, count=count, seed=seed)
    chosen: list[Conversation] = []
    cut = passed_over = 0
    for conversation in offered:
        if len(chosen) == count:
            break
        whole = _with_short_answers(conversation, output_tokens_max)
        fitting = _fitting(whole.first(turns_max) if turns_max else whole, context_tokens_max)
        if fitting is None:
            passed_over += 1
            continue
        cut += len(fitting.turns) < len(conversation.turns)
        chosen.append(fitting)
    if not chosen:
        raise WorkloadError(f"no conversation of {trace} fits into {context_tokens_max} tokens")
    return Chosen(trace=trace, conversations=tuple(chosen), cut=cut, passed_over=passed_over)


def _offered(trace: str, *, count: int, seed: int) -> tuple[Conversation, ...]:
    if trace in SHAPES:
        return generate(trace, conversations=2 * count, seed=seed)
    path = Path(trace)
    if not path.is_file():
        raise WorkloadError(f"no trace {trace!r}: give a file, or one of {', '.join(SHAPES)}")
    return load_conversations(path)


def _with_short_answers(conversation: Conversation, most: int) -> Conversation:
    if not most:
        return conversation
    turns = tuple(replace(turn, output_tokens=min(turn.output_tokens, most)) for turn in conversation.turns)
    return replace(conversation, turns=turns)


def _fitting(conversation: Conversation, context_tokens_max: int) -> Conversation | None:
    if not context_tokens_max:
        return conversation
    for number, turn in enumerate(conversation.turns):
        if conversation.prompt_tokens(number) + turn.output_tokens > context_tokens_max:
            return conversation.first(number) if number else None
    return conversation

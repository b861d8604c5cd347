"""An answer as tokens, and what each token shows to the client."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from conserve_lab.emulator.language.prompt import Call, call_tokens
from conserve_lab.emulator.language.tokens import (
    Mark,
    TokenIds,
    is_mark,
    mark_id,
    new_tokens,
    pieces,
    text_tokens,
)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token adds to the message: text, the start of a call, or a piece of a call's arguments."""

    content: str = ""
    call_index: int | None = None
    call_id: str = ""
    call_name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer, known before its first token is due."""

    token_ids: TokenIds
    deltas: tuple[Delta | None, ...]
    """One entry per token; None for a token that shows nothing by itself."""
    finish_reason: str
    """`stop`, `length` or `tool_calls`."""
    stop_reason: str | None = None
    """The stop string that ended the answer."""
    cut_off_call: str = ""
    """What a call cut off by the length limit looks like as text (vLLM returns it as content)."""
    whole_calls: int | None = None
    """With `cut_off_call`: how many calls before it are whole."""


@dataclass(slots=True)
class RenderedCall:
    """A tool call of a finished message."""

    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """A finished message: the fold of its deltas."""

    content: str = ""
    calls: list[RenderedCall] = field(default_factory=list)


def speak(text: str, calls: Iterable[Call], *, call_id_prefix: str, finish_reason: str = "stop") -> Answer:
    """Return the answer that says `text`, makes `calls` and then stops by itself."""
    ids = new_tokens(text_tokens(text)) if text else new_tokens()
    deltas: list[Delta | None] = [Delta(content=piece) if piece else None for piece in pieces(ids)]
    for index, call in enumerate(calls):
        tokens = call_tokens(call)
        ids.extend(tokens)
        deltas += _call_deltas(call, tokens, index=index, call_id=f"{call_id_prefix}{index}")
    ids.append(mark_id(Mark.END))
    deltas.append(None)
    return Answer(token_ids=ids, deltas=tuple(deltas), finish_reason=finish_reason)


def cut(answer: Answer, *, max_tokens: int) -> Answer:
    """Return the answer after at most `max_tokens` tokens."""
    if len(answer.token_ids) <= max_tokens:
        return answer
    ids = answer.token_ids[:max_tokens]
    cut_off = _cut_off_call(ids)
    return Answer(
        token_ids=ids,
        deltas=answer.deltas[:max_tokens],
        finish_reason="length",
        cut_off_call=cut_off,
        whole_calls=ids.count(mark_id(Mark.CALL)) - 1 if cut_off else None,
    )


def stop_at(answer: Answer, stop: Iterable[str], *, include: bool = False) -> Answer:
    """Return the answer ended by the first stop string that its text contains.

    Args:
        answer: The whole answer.
        stop: Stop strings.
        include: Whether the stop string stays in the text (`include_stop_str_in_output`).
    """
    shown = [delta.content if delta else "" for delta in answer.deltas]
    text = "".join(shown)
    found = min(((text.index(word), word) for word in stop if word and word in text), default=None)
    if found is None:
        return answer
    begin, word = found
    end = begin + len(word)
    keep = end if include else begin
    deltas: list[Delta | None] = []
    position = 0
    for piece in shown:
        part = piece[: max(0, keep - position)]
        deltas.append(Delta(content=part) if part else None)
        position += len(piece)
        if position >= end:
            break
    return Answer(
        token_ids=answer.token_ids[: len(deltas)],
        deltas=tuple(deltas),
        finish_reason="stop",
        stop_reason=word,
    )


def assemble(answer: Answer) -> Message:
    """Return the message that all of an answer's deltas add up to."""
    message = Message()
    for delta in answer.deltas:
        if delta is None:
            continue
        message.content += delta.content
        if delta.call_name:
            message.calls.append(RenderedCall(delta.call_id, delta.call_name))
        elif delta.call_index is not None:
            message.calls[delta.call_index].arguments += delta.arguments
    if answer.whole_calls is not None:
        del message.calls[answer.whole_calls :]
        message.content += answer.cut_off_call
    return message


_OPENING = "<tool_call>"


def _call_deltas(call: Call, tokens: TokenIds, *, index: int, call_id: str) -> list[Delta | None]:
    """Return per-token deltas of a call: id and name when the name is complete, then argument pieces."""
    start = tokens.index(mark_id(Mark.ARGUMENTS))
    deltas: list[Delta | None] = [None] * start
    deltas.append(Delta(call_index=index, call_id=call_id, call_name=call.name))
    deltas += [Delta(call_index=index, arguments=piece) if piece else None for piece in pieces(tokens[start + 1 :])]
    return deltas


def _cut_off_call(ids: TokenIds) -> str:
    """Return the raw text of a call that the end of `ids` cut in two, or an empty string."""
    last = max((at for at, token in enumerate(ids) if token == mark_id(Mark.CALL)), default=None)
    if last is None:
        return ""
    tail = ids[last + 1 :]
    if mark_id(Mark.ARGUMENTS) not in tail:
        name = "".join(pieces([token for token in tail if not is_mark(token)]))
        return _OPENING + (f'{{"name": "{name}' if name else "")
    at = tail.index(mark_id(Mark.ARGUMENTS))
    name, arguments = "".join(pieces(tail[:at])), "".join(pieces(tail[at + 1 :]))
    if _is_json(arguments):
        return ""
    return f'{_OPENING}{{"name": "{name}", "arguments": {arguments}'


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True

"""Reads published traces. Each line of a JSONL file (or `.jsonl.gz`) is a conversation or a request.

Understood: ConServe's own sizes (`turns` with `input_tokens_new` and `output_tokens`), OpenAI messages (`messages`),
Mooncake's and aiperf's request lines (`input_length`, `output_length`, with `session_id` where they have turns), and
TraceLab's rounds (`input_tokens_total`, `output_tokens`, `session_id`, `tools` with their latencies).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from conserve_lab.workloads.conversation import Conversation, Turn, WorkloadError

BYTES_PER_TOKEN = 4
"""How messages become tokens without a tokenizer; good to about 15 % on English and code."""
MESSAGE_TOKENS = 4
"""What a chat template adds per message."""


def load_conversations(path: Path) -> tuple[Conversation, ...]:
    """Read every conversation of a file.

    Raises:
        WorkloadError: a line is of none of the shapes, or nothing is in the file.
        OSError: the file cannot be read.
    """
    rows = list(_rows(path))
    if rows and "input_length" in rows[0]:
        found = _from_requests(rows, path)
    elif rows and "input_tokens_total" in rows[0]:
        found = _from_rounds(rows, path)
    else:
        found = tuple(_conversation(row, f"{path.name}:{number}") for number, row in enumerate(rows, start=1))
    if not found:
        raise WorkloadError(f"{path} holds no conversation")
    return found


def _opened(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise WorkloadError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise WorkloadError(f"{path}:{number} is not an object")
            yield row


def _conversation(row: dict[str, Any], where: str) -> Conversation:
    try:
        if "turns" in row:
            return _from_sizes(row, where)
        if "messages" in row:
            return _from_messages(row, where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorkloadError(f"{where}: {type(error).__name__}: {error}") from error
    raise WorkloadError(
        f"{where} has neither `turns` nor `messages`: see the formats in conserve_lab.workloads.loaders"
    )


def _from_sizes(row: dict[str, Any], where: str) -> Conversation:
    turns = tuple(
        Turn(
            append_tokens=max(int(turn["input_tokens_new"]), 1),
            output_tokens=max(int(turn["output_tokens"]), 1),
            gap_us=_gap_us(turn.get("tool_seconds"), turn.get("gap_s")),
        )
        for turn in row["turns"]
    )
    shared = min(int(row.get("shared_prefix_tokens") or 0), turns[0].append_tokens) if turns else 0
    return Conversation(conversation_id=str(row.get("id", where)), turns=turns, shared_tokens=shared)


def _gap_us(*seconds: float | None) -> int:
    return round(next((float(value) for value in seconds if value is not None), 0.0) * 1_000_000)


def _from_messages(row: dict[str, Any], where: str) -> Conversation:
    """Each assistant message ends a turn; everything before it, since the last one, is its append."""
    turns: list[Turn] = []
    append = len(json.dumps(row.get("tools") or "", ensure_ascii=False).encode()) // BYTES_PER_TOKEN
    for message in row["messages"]:
        size = _message_tokens(message)
        if message["role"] == "assistant":
            turns.append(Turn(append_tokens=max(append, 1), output_tokens=max(size, 1)))
            append = 0
        else:
            append += size
    return Conversation(conversation_id=str(row.get("id", where)), turns=tuple(turns))


def _message_tokens(message: dict[str, Any]) -> int:
    said = [message.get("content"), message.get("tool_calls")]
    text = "".join(
        part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in said if part is not None
    )
    return MESSAGE_TOKENS + len(text.encode()) // BYTES_PER_TOKEN


def _from_requests(rows: Sequence[dict[str, Any]], path: Path) -> tuple[Conversation, ...]:
    """Requests with full input lengths; those of one session are its turns, the others stand alone."""
    sessions: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows, start=1):
        sessions.setdefault(str(row.get("session_id", f"{path.name}:{number}")), []).append(row)
    found = []
    for name, requests in sessions.items():
        turns: list[Turn] = []
        context = 0
        try:
            for request in requests:
                length, output = int(request["input_length"]), max(int(request["output_length"]), 1)
                gap_us = round(float(request.get("delay") or 0) * 1000)
                turns.append(Turn(append_tokens=max(length - context, 1), output_tokens=output, gap_us=gap_us))
                context += turns[-1].append_tokens + output
        except (KeyError, TypeError, ValueError) as error:
            raise WorkloadError(f"{path}, session {name}: {type(error).__name__}: {error}") from error
        found.append(Conversation(conversation_id=name, turns=tuple(turns)))
    return tuple(found)


def _from_rounds(rows: Sequence[dict[str, Any]], path: Path) -> tuple[Conversation, ...]:
    """TraceLab: a line a round. A context that shrinks was compacted: what follows is another conversation."""
    found: list[Conversation] = []
    sessions: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sessions.setdefault(str(row.get("session_id")), []).append(row)
    for name, rounds in sessions.items():
        try:
            ordered = sorted(rounds, key=lambda row: int(row["round_index"]))
            for part, turns in enumerate(_uncompacted(ordered), start=1):
                found.append(Conversation(conversation_id=f"{name}.{part}", turns=tuple(turns)))
        except (KeyError, TypeError, ValueError) as error:
            raise WorkloadError(f"{path}, session {name}: {type(error).__name__}: {error}") from error
    return tuple(found)


def _uncompacted(rounds: Sequence[dict[str, Any]]) -> Iterator[list[Turn]]:
    turns: list[Turn] = []
    context = 0
    for row in rounds:
        total, output = int(row["input_tokens_total"]), max(int(row["output_tokens"]), 1)
        if turns and total <= context:
            yield turns
            turns, context = [], 0
        tools_ms = [float(tool.get("tool_wall_latency_ms") or 0) for tool in row.get("tools") or []]
        turns.append(
            Turn(
                append_tokens=max(total - context, 1),
                output_tokens=output,
                gap_us=round(max(tools_ms, default=0.0) * 1000),  # tools of one round run beside each other
            )
        )
        context = max(total, 1) + output
    if turns:
        yield turns

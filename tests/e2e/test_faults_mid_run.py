"""Something dies while agents are at work: every conversation still ends with the very answers it would have had.

The emulated engines answer the same prompt with the same words, so a lost or doubled message anywhere would change all
that follows it. Every test has a minute.
"""

import threading
from collections.abc import Callable
from typing import Any

from conserve_lab.stack import LocalStack
from conserve_sdk.telemetry import TurnRecord


def said(run: Any) -> list[tuple[str, Any]]:
    """Everything in a conversation except ids drawn at random."""
    return [
        (message.text, [(call["name"], call["args"]) for call in getattr(message, "tool_calls", [])])
        for message in run.messages
    ]


class Once:
    """Does something at the first turn that fits, in the thread of that turn: the others have not ended yet."""

    def __init__(self, when: Callable[[TurnRecord], bool], do: Callable[[TurnRecord], None]) -> None:
        self._when, self._do = when, do
        self._lock = threading.Lock()
        self.done: TurnRecord | None = None

    def __call__(self, record: TurnRecord) -> None:
        with self._lock:
            if self.done is not None or not self._when(record):
                return
            self.done = record
        self._do(record)


async def test_broker_restarts_in_the_middle(crew: Any, stack: LocalStack) -> None:
    undisturbed = [said(run) for run in await crew.run(stack)]

    def restart(record: TurnRecord) -> None:
        stack.broker.kill()
        stack.broker.start()

    once = Once(lambda record: record.turn == 2, restart)
    runs = await crew.run(stack, on_turn=once)
    assert once.done is not None
    assert [run.error for run in runs] == [""] * len(runs)
    assert [said(run) for run in runs] == undisturbed
    for run in runs:
        records = [record for record in crew.turns.records if record.conversation_id == run.task.conversation_id]
        assert len({record.decoder_id for record in records}) == 1, "a restart of the broker moves nobody"
        assert sum(record.migrated for record in records) == 1


async def test_broker_stays_dead(crew: Any, stack: LocalStack) -> None:
    """Conversations that have a lease go on without a broker."""
    undisturbed = [said(run) for run in await crew.run(stack)]
    started: set[str] = set()

    def all_started(record: TurnRecord) -> bool:
        started.add(record.conversation_id)
        return len(started) == len(crew.tasks)

    once = Once(all_started, lambda record: stack.broker.kill())
    try:
        runs = await crew.run(stack, on_turn=once, goodbye=False)
    finally:
        stack.broker.start()
    assert once.done is not None
    assert [run.error for run in runs] == [""] * len(runs)
    assert [said(run) for run in runs] == undisturbed


async def test_decoder_dies_in_the_middle(crew: Any, stack: LocalStack) -> None:
    """Whole answers: of a stream that has begun, nothing may be repeated, so it would rightly end in an error."""
    undisturbed = [said(run) for run in await crew.run(stack, streaming=False)]

    def kill_its_decoder(record: TurnRecord) -> None:
        assert record.decoder_id is not None
        stack.fleet.kill(record.decoder_id)

    once = Once(lambda record: record.turn == 2 and not record.loss, kill_its_decoder)
    runs = await crew.run(stack, on_turn=once, streaming=False)
    assert once.done is not None
    assert [run.error for run in runs] == [""] * len(runs)
    assert [said(run) for run in runs] == undisturbed
    records = crew.turns.records
    after = [r for r in records if r.conversation_id == once.done.conversation_id and r.turn > once.done.turn]
    assert all(record.decoder_id != once.done.decoder_id for record in after)
    losses = {(record.conversation_id, record.loss) for record in records if record.loss}
    assert (once.done.conversation_id, "decoder_failed") in losses, "the loss is counted, under its name"
    # Whoever was just moving its KV to that decoder lost the transfer first.
    assert {loss for _, loss in losses} <= {"decoder_failed", "transfer_failed"}


async def test_decoder_restarts_in_the_middle(crew: Any, stack: LocalStack) -> None:
    """An empty cache costs time and nothing else."""
    undisturbed = [said(run) for run in await crew.run(stack, streaming=False)]

    def restart_its_decoder(record: TurnRecord) -> None:
        assert record.decoder_id is not None
        stack.fleet.restart(record.decoder_id)

    once = Once(lambda record: record.turn == 2, restart_its_decoder)
    runs = await crew.run(stack, on_turn=once, streaming=False)
    assert once.done is not None
    assert [run.error for run in runs] == [""] * len(runs)
    assert [said(run) for run in runs] == undisturbed


async def test_prefillers_die_in_the_middle(crew: Any, stack: LocalStack) -> None:
    """First turns fall back to their decoder, follow-ups never notice."""
    undisturbed = [said(run) for run in await crew.run(stack)]
    for prefiller in stack.fleet.prefillers:
        prefiller.kill()
    runs = await crew.run(stack)
    assert [run.error for run in runs] == [""] * len(runs)
    assert [said(run) for run in runs] == undisturbed
    assert not any(record.migrated for record in crew.turns.records)
    assert {record.loss for record in crew.turns.records if not record.first_turn} <= {""}

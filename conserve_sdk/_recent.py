"""The turn that ended last: in the enclosing `conversation` block, in this context, in the process."""

from __future__ import annotations

from contextvars import ContextVar

from conserve_sdk.identity import current_tally
from conserve_sdk.telemetry import Tally, TurnRecord, TurnStart
from conserve_sdk.telemetry._observer import EndWatch

__all__ = ["ContextFollower", "last_turn"]


class _Process:
    last: TurnRecord | None = None


class _Slot(EndWatch):
    """The newest turn of a context: until it ends, the one before it counts."""

    def __init__(self, *, before: TurnRecord | None, tally: Tally | None) -> None:
        self.record = before
        self._tally = tally

    def end(self, record: TurnRecord, /, *, at_us: int) -> None:  # noqa: ARG002 -- the protocol's
        """Note the turn."""
        self.record = _Process.last = record
        tally, self._tally = self._tally, None
        if tally is not None:
            tally(record)


_newest: ContextVar[_Slot | None] = ContextVar("conserve_newest_turn", default=None)


class ContextFollower:
    """An observer that notes each turn for `last_turn` and for the `conversation` block it was begun in."""

    def begin_turn(self, turn: TurnStart, /) -> _Slot:  # noqa: ARG002 -- the protocol's
        """Remember the context: the turn may end in another one (a stream closed by the event loop)."""
        before = _newest.get()
        slot = _Slot(before=None if before is None else before.record, tally=current_tally())
        _newest.set(slot)
        return slot


def last_turn() -> TurnRecord | None:
    """The turn that ended last, as seen from here.

    Inside `with conversation(...)`: the last one of that conversation made in the block, also by threads and tasks
    that inherited it (None before the first). Outside: the last one that was begun in this context, which is this
    task or this thread. In a context that began none: the last one of the whole process. Frameworks that run each
    step in a context of its own (LangGraph does) leave only the last of these; ask `ConServe.stats` there.

    Returns:
        None when no turn has ended yet. A streamed turn ends when its stream is read to the end, or closed.
    """
    tally = current_tally()
    if tally is not None:
        return tally.stats().last
    slot = _newest.get()
    own = None if slot is None else slot.record
    return own or _Process.last

"""Changes on their way from the event loop to the journal: in groups, and how long the loop waits for each.

The journal writes in a thread, which takes the interpreter's lock back after every call to SQLite. Beside a busy loop
each time can cost a switch interval, and half a millisecond of work took 10 to 40. So the loop stands still for a
group while the disk is fast, and goes on without it where the disk is not. What a group costs beside its rows is a
third of a busy broker's grant, so groups that follow each other keep a distance; one that comes alone goes at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from conserve_broker.journal import Change, JournalPort

__all__ = ["GroupCommit"]

HOLD_S = 0.01
"""The loop never stands still for longer; a checkpoint takes a third of it."""
FAST_S = 0.002
"""Where groups usually take longer, the thread loses less to a busy loop than the loop to a slow disk."""
APART_S = 1.0
"""How long the loop then goes on without waiting, before it tries again."""
SPACING_S = 0.002
"""From the end of a group to the beginning of the next, at least."""
DUTY = 2
"""And so many times as long as a group usually takes: the loop stands still for a third of its time at most."""
_WEIGHT = 1 / 16


class GroupCommit:
    """Collects changes and has them written. Everything here runs on the event loop.

    Args:
        journal: writes them.
        ended: hears of each group how many seconds it took and why it failed, before anybody who waits for it goes on.
        clock: seconds, never going backwards.
        spacing_s: see `SPACING_S`.
    """

    def __init__(
        self,
        journal: JournalPort,
        *,
        ended: Callable[[float, BaseException | None], None],
        clock: Callable[[], float] = time.perf_counter,
        spacing_s: float = SPACING_S,
    ) -> None:
        self._journal = journal
        self._ended = ended
        self._clock = clock
        self._unsent: list[Change] = []
        self._commit: asyncio.Future[None] | None = None
        self._spacing_s = spacing_s
        self._next_s = self._apart_until_s = clock()
        self._usual_s = 0.0

    @property
    def pending(self) -> asyncio.Future[None] | None:
        """What is not durable yet is when this has ended; None: all of it is. Groups end in order."""
        return self._commit if self._commit is not None and not self._commit.done() else None

    def submit(self, changes: Sequence[Change]) -> None:
        """Have the changes written; whatever else comes before they are handed over goes with them."""
        if not changes:
            return
        if not self._unsent:
            loop = asyncio.get_running_loop()
            self._commit = loop.create_future()
            early_s = self._next_s - self._clock()
            if early_s > 0:
                loop.call_later(early_s, self.flush)
            else:
                loop.call_soon(self.flush)
        self._unsent += changes

    def flush(self) -> None:
        """Hand over what was collected, if anything."""
        commit, changes = self._commit, self._unsent
        if commit is None or not changes:
            return
        self._unsent = []
        began_s = self._clock()

        def done(written: Future[None]) -> None:
            error = written.exception()
            self._ended(self._clock() - began_s, error)
            if not commit.done():
                commit.set_exception(error) if error is not None else commit.set_result(None)
                commit.exception()  # nobody need wait for it

        loop = asyncio.get_running_loop()
        written = self._journal.submit(changes)
        self._wait(written, began_s)
        self._next_s = self._clock() + max(self._spacing_s, DUTY * self._usual_s)
        # One way for all, so that they end in order: one before may have ended this instant, without having been heard.
        written.add_done_callback(lambda _: None if loop.is_closed() else loop.call_soon_threadsafe(done, written))

    def _wait(self, written: Future[None], began_s: float) -> None:
        """Let the loop stand still for it, unless groups take too long for that."""
        if written.done() or began_s < self._apart_until_s:
            return
        with contextlib.suppress(TimeoutError):
            written.exception(timeout=HOLD_S)
        now_s = self._clock()
        self._usual_s += (now_s - began_s - self._usual_s) * _WEIGHT
        if self._usual_s > FAST_S:
            self._usual_s, self._apart_until_s = 0.0, now_s + APART_S

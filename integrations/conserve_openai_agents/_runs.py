"""The runs of the Agents SDK that are under way, and what becomes of their conversations when they return.

The runner asks a model for turns and tells it when the run is over, but not how it ended. That shows in the last
answer: a run that ends on an open call of a tool that may need approval waits for a person, any other has returned.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from agents import Tool
from agents.tool import FunctionTool

from conserve_sdk import ConServe

__all__ = ["Run", "RunBook", "book_of"]

GOODBYE_S = 1.0
"""Longest time that telling the broker of a run's end may take; a lease it does not hear of ends by its own time."""

log = logging.getLogger("conserve_openai_agents")


@dataclass(eq=False, slots=True, weakref_slot=True)
class Run:
    """One run under way.

    Attributes:
        conversations: the conversations of its turns; True for one that is this run's alone and ends with it.
        parent: the run whose tool started this one, where that is known.
        waits: its last answer is an open call that a person may have to approve.
        over: the runner has said that it is over.
    """

    conversations: dict[str, bool] = field(default_factory=dict)
    parent: Run | None = None
    waits: bool = False
    over: bool = False

    @property
    def main_conversation(self) -> str | None:
        """The conversation of its first turn."""
        return next(iter(self.conversations), None)

    def asks(self, conversation: str, *, owned: bool) -> None:
        """A turn of this run begins."""
        self.waits = False
        self.conversations.setdefault(conversation, owned)

    def answered(self, output: Iterable[Any], tools: Sequence[Tool]) -> None:
        """The model has answered: see whether the run may stop here until somebody approves."""
        open_to_people = {tool.name for tool in tools if may_need_approval(tool)}
        self.waits = any(_called(item) in open_to_people for item in output)


class RunBook:
    """The runs over one `ConServe` object. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: WeakKeyDictionary[object, Run] = WeakKeyDictionary()

    def run_of(self, owner: object | None) -> Run | None:
        """The run that a model call belongs to, and from now on the one that surrounds what its tools start."""
        if owner is None:
            return None
        with self._lock:
            run = self._runs.get(owner)
            if run is None:
                around = _around.get()
                run = self._runs[owner] = Run(parent=around if around is not None and not around.over else None)
        _around.set(run)
        return run

    async def end(self, owner: object, *, conserve: ConServe) -> None:
        """The run is over: release what was its own, park what waits for a person, leave the rest to its time."""
        with self._lock:
            run = self._runs.pop(owner, None)
            if run is None:
                return  # another model of the same run was told first
            run.over = True
            elsewhere = {name for other in self._runs.values() for name in other.conversations}
        if run.waits and run.parent is not None and not run.parent.over:
            run.parent.waits = True  # the tool that started this run cannot answer either
        mine = {name: owned for name, owned in run.conversations.items() if name not in elsewhere}
        for name in mine:
            conserve.idle(name)
        try:
            async with asyncio.timeout(GOODBYE_S):
                await _say_goodbye(mine, waits=run.waits, conserve=conserve)
        except TimeoutError:
            log.info("run_end_untold: the broker did not answer in %s s; the leases end by their time", GOODBYE_S)


async def _say_goodbye(conversations: dict[str, bool], *, waits: bool, conserve: ConServe) -> None:
    for name, owned in conversations.items():
        if conserve.closed:
            return
        if waits:
            await conserve.apark(name)
        elif owned:
            await conserve.arelease(name)


def may_need_approval(tool: Tool) -> bool:
    """Whether a call of this tool may stop the run until a person approves. When in doubt, yes."""
    policy = getattr(tool, "needs_approval", None)
    if policy is None:
        return not isinstance(tool, FunctionTool)
    return policy is not False


def book_of(conserve: ConServe) -> RunBook:
    """The runs of a `ConServe` object, shared by all models made from it."""
    with _books_lock:
        book = _books.get(conserve)
        if book is None:
            book = _books[conserve] = RunBook()
        return book


def _called(item: Any) -> str | None:
    """The tool that an output item calls, None where it calls none."""
    is_call = getattr(item, "type", None) in ("function_call", "custom_tool_call")
    return getattr(item, "name", None) if is_call else None


_around: ContextVar[Run | None] = ContextVar("conserve_openai_agents_run", default=None)
"""The run in whose tasks this code runs. Set in model calls and inherited by the tasks of the tools they ask for."""

_books: WeakKeyDictionary[ConServe, RunBook] = WeakKeyDictionary()
_books_lock = threading.Lock()

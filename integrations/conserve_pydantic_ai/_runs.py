"""Agent runs under way, and what becomes of their conversations when they return.

A run that returns although its last answer calls a function has left that call to somebody else: it needs an approval
or is done elsewhere (`DeferredToolRequests`). A call of an output tool is the run's result.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from pydantic_ai.messages import ModelResponse
from pydantic_ai.models import ModelRequestParameters

from conserve_sdk import ConServe

__all__ = ["Run", "current_run", "run_scope"]

GOODBYE_S = 1.0
"""Longest time that telling the broker of a pause may take; a lease it does not hear of ends by its own time."""

log = logging.getLogger("conserve_pydantic_ai")


@dataclass(eq=False, slots=True)
class Run:
    """One agent run.

    Attributes:
        parent: the run whose tool started this one.
        conversations: of its turns.
        defers: its last answer calls functions and gives no result.
    """

    parent: Run | None = None
    conversations: dict[str, None] = field(default_factory=dict)
    defers: bool = False

    @property
    def conversation_around(self) -> str | None:
        """The conversation of the run around this one, whose tool started it."""
        return next(reversed(self.parent.conversations), None) if self.parent is not None else None

    def asks(self, conversation: str | None) -> None:
        """A turn begins."""
        self.defers = False
        if conversation is not None:
            self.conversations[conversation] = None

    def answered(self, answer: ModelResponse, parameters: ModelRequestParameters) -> None:
        """The model has answered."""
        results = {tool.name for tool in parameters.output_tools}
        called = {call.tool_name for call in answer.tool_calls}
        self.defers = bool(called) and not called & results

    def is_inside(self, conversation: str) -> bool:
        """Whether a run around this one is a part of the conversation too, so that it goes on."""
        around = self.parent
        while around is not None and conversation not in around.conversations:
            around = around.parent
        return around is not None


_current: ContextVar[Run | None] = ContextVar("conserve_pydantic_ai_run", default=None)


def current_run() -> Run | None:
    """The run that a model request belongs to."""
    return _current.get()


@asynccontextmanager
async def run_scope(conserve: ConServe) -> AsyncGenerator[None]:
    """Surround one agent run; what its requests note down decides what the broker is told at the end."""
    around = _current.get()
    run = Run(parent=around)
    _current.set(run)
    returned = False
    try:
        yield
        returned = True
    finally:
        _current.set(around)  # by value: a run may end in another context than it began in
        await _end(run, parks=returned and run.defers, conserve=conserve)


async def _end(run: Run, *, parks: bool, conserve: ConServe) -> None:
    mine = [name for name in run.conversations if not run.is_inside(name)]
    for name in mine:
        conserve.idle(name)
    if not parks:
        return
    try:
        async with asyncio.timeout(GOODBYE_S):
            for name in mine:
                if not conserve.closed:
                    await conserve.apark(name)
    except TimeoutError:
        log.info("pause_untold: the broker did not answer in %s s; the leases end by their time", GOODBYE_S)

"""What LangGraph tells about its runs, and what follows for leases: idle at the end, parked at an interrupt."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Self
from uuid import UUID

from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tracers.context import register_configure_hook
from langgraph.callbacks import GraphCallbackHandler, GraphInterruptEvent
from langgraph.errors import GraphInterrupt

from conserve_langgraph._identity import named_in_metadata
from conserve_langgraph._parking import Parking
from conserve_langgraph._runs import Episode, RunBook
from conserve_sdk import ConServe
from conserve_sdk.identity import wire_id

__all__ = ["ConServeCallbackHandler", "note_turn"]

_book = RunBook()
_parking = Parking()


class ConServeCallbackHandler(GraphCallbackHandler):
    """Follows graph runs: END makes their conversations' leases idle, an interrupt parks them.

    Importing `conserve_langgraph` makes LangChain add one to every run, so that `interrupt()` and
    `HumanInTheLoopMiddleware` need nothing. Breakpoints that are compiled into a graph (`interrupt_before=`,
    `interrupt_after=`) are told only to handlers in the run's own config: add one there.

    Example:
        ```python
        graph = builder.compile(checkpointer=saver, interrupt_before=["tools"])
        graph = graph.with_config(callbacks=[ConServeCallbackHandler()])
        ```
    """

    run_inline = True  # nothing here blocks, and another thread would cost more than the work
    ignore_llm = True
    ignore_chat_model = True
    ignore_retriever = True
    ignore_retry = True
    ignore_custom_event = True

    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A graph, a node or any other chain begins."""
        metadata = metadata or {}
        _book.start(run_id, parent_run_id, thread=named_in_metadata(metadata), graph="langgraph_node" in metadata)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """It ended."""
        _settle(_book.end(run_id))

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """It failed, was abandoned, or was interrupted: LangGraph raises that through the node."""
        if isinstance(error, GraphInterrupt):
            _book.interrupt(run_id)
        _settle(_book.end(run_id))

    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A tool begins; it may run an agent of its own."""
        self.on_chain_start(None, input_str, run_id=run_id, parent_run_id=parent_run_id, metadata=metadata)

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """It ended."""
        self.on_chain_end(output, run_id=run_id)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """It failed, or asks a person."""
        self.on_chain_error(error, run_id=run_id)

    def on_interrupt(self, event: GraphInterruptEvent) -> None:
        """The graph stops to wait for a person, at a breakpoint or by `interrupt()`."""
        _book.interrupt(event.run_id)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # it has no state of its own


_handler: ContextVar[ConServeCallbackHandler | None] = ContextVar(
    "conserve_langgraph_handler",
    default=ConServeCallbackHandler(),  # noqa: B039 -- stateless: the default is for all contexts, threads included
)
register_configure_hook(_handler, inheritable=True, handle_class=ConServeCallbackHandler)


def note_turn(conserve: ConServe, conversation: str, *, thread: str | None) -> None:
    """Remember that a turn of `conversation` is made in the run around the caller.

    Args:
        conserve: who holds its lease.
        conversation: as it goes over the wire.
        thread: as the call's config names it; used where the context of the run is lost.
    """
    callbacks = (var_child_runnable_config.get() or {}).get("callbacks")
    _book.note(conserve, conversation, run_id=getattr(callbacks, "parent_run_id", None), thread=thread)


def _settle(episode: Episode | None) -> None:
    """An episode is over: nothing of it is renewed any more, and what waits for a person is parked."""
    if episode is None or not episode.graph:
        return
    conversations = dict(episode.used)
    thread = episode.thread
    if thread is not None and episode.interrupted:
        # Also the lease of an earlier run of the thread, if this one was interrupted before its first turn.
        conversations |= dict.fromkeys((conserve, wire_id(thread)) for conserve in _book.seen() if not conserve.closed)
    for conserve, conversation in conversations:
        conserve.idle(conversation)
        if episode.interrupted:
            _parking.park(conserve, conversation, unless=lambda: thread is not None and _book.is_running(thread))

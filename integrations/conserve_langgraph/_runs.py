"""Runs of graphs in progress, and the conversations whose turns they make.

LangChain names every run and its parent. All runs below an outermost one on the same thread are one *episode*: it is
over when its outermost runs are, and only then is it known whether the thread ended its turn or waits for a person.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from uuid import UUID
from weakref import WeakSet

from conserve_sdk import ConServe
from conserve_sdk._fork import call_in_forked_child

RUNS_MAX = 20_000
"""Runs remembered at once; the oldest are forgotten first, should a framework not tell of their end."""


@dataclass(slots=True, eq=False)
class Episode:
    """The runs of one thread from the outermost one's start to its end.

    Attributes:
        thread: LangGraph's thread, None for a run that has none.
        graph: whether a graph's node ran in it.
        interrupted: whether LangGraph stopped it to wait for a person.
        used: the conversations whose turns were made in it, and the objects that hold their leases.
    """

    thread: str | None
    graph: bool = False
    interrupted: bool = False
    used: dict[tuple[ConServe, str], None] = field(default_factory=dict)
    outermost: set[UUID] = field(default_factory=set)
    members: set[UUID] = field(default_factory=set)


class RunBook:
    """All episodes in progress. Thread-safe; nothing here does I/O.

    Args:
        runs_max: runs remembered at once.
    """

    def __init__(self, *, runs_max: int = RUNS_MAX) -> None:
        self._runs_max = runs_max
        self._start_afresh()
        call_in_forked_child(self._start_afresh)

    def start(self, run_id: UUID, parent_run_id: UUID | None, *, thread: str | None, graph: bool) -> None:
        """A run began: it belongs to its parent's episode, unless it has another thread."""
        with self._lock:
            episode = self._episode_of.get(parent_run_id) if parent_run_id else None
            if episode is None or (thread is not None and thread != episode.thread):
                episode = self._outermost(thread)
                episode.outermost.add(run_id)
            episode.graph = episode.graph or graph
            episode.members.add(run_id)
            self._episode_of[run_id] = episode
            while len(self._episode_of) > self._runs_max:
                self._forget(next(iter(self._episode_of)))

    def note(self, conserve: ConServe, conversation: str, *, run_id: UUID | None, thread: str | None) -> None:
        """A turn of a conversation is made in a run, or, where the run is not known, in a thread's episode."""
        with self._lock:
            self._seen.add(conserve)
            episode = self._episode_of.get(run_id) if run_id else None
            if episode is None and thread is not None:
                episode = self._episode_on.get(thread)
            if episode is not None:
                episode.used[conserve, conversation] = None

    def interrupt(self, run_id: UUID | None) -> None:
        """LangGraph interrupted a run."""
        with self._lock:
            episode = self._episode_of.get(run_id) if run_id else None
            if episode is not None:
                episode.interrupted = True

    def end(self, run_id: UUID) -> Episode | None:
        """A run is over; returns its episode if that is over too."""
        with self._lock:
            episode = self._episode_of.get(run_id)
            if episode is None:
                return None
            was_outermost = run_id in episode.outermost
            self._forget(run_id)
            return episode if was_outermost and not episode.outermost else None

    def is_running(self, thread: str) -> bool:
        """Whether an episode of the thread is in progress."""
        with self._lock:
            return thread in self._episode_on

    def seen(self) -> list[ConServe]:
        """Return every living object that turns of any run went through."""
        with self._lock:
            return list(self._seen)

    def _start_afresh(self) -> None:
        # Also in a forked child, where the parent's runs do not go on.
        self._lock = threading.Lock()
        self._episode_of: OrderedDict[UUID, Episode] = OrderedDict()
        self._episode_on: dict[str, Episode] = {}
        self._seen: WeakSet[ConServe] = WeakSet()

    def _outermost(self, thread: str | None) -> Episode:
        """The thread's episode; a second run on the thread at the same time prolongs it."""
        if thread is None:
            return Episode(None)
        return self._episode_on.setdefault(thread, Episode(thread))

    def _forget(self, run_id: UUID) -> None:
        """Take a run out; with the last outermost one goes what is left of its episode."""
        episode = self._episode_of.pop(run_id)
        episode.members.discard(run_id)
        if run_id not in episode.outermost:
            return
        episode.outermost.discard(run_id)
        if episode.outermost:
            return
        for member in episode.members:
            self._episode_of.pop(member, None)
        if episode.thread is not None:
            self._episode_on.pop(episode.thread, None)

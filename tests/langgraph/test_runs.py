"""The bookkeeping of runs and the threads that park: no engines, no broker."""

import os
import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast
from uuid import uuid4

import pytest

from conserve_langgraph import ConServeCallbackHandler
from conserve_langgraph._parking import STALE_S, Parking
from conserve_langgraph._runs import RunBook
from conserve_sdk import ConServe

Until = Callable[[Callable[[], bool]], None]


class Lot:
    """Stands where a ConServe object would: counts what is parked, or fails as a broker might."""

    def __init__(self, error: Exception | None = None) -> None:
        self.parked: list[tuple[str, str]] = []
        self.calls = 0
        self._error = error

    def park(self, conversation_id: str) -> int:
        self.calls += 1
        if self._error is not None:
            raise self._error
        self.parked.append((conversation_id, threading.current_thread().name))
        return 1


def _as_conserve(lot: Lot) -> ConServe:
    return cast("ConServe", lot)


def test_an_episode_ends_with_its_outermost_run() -> None:
    book, root, node, model = RunBook(), uuid4(), uuid4(), uuid4()
    conserve = _as_conserve(Lot())
    book.start(root, None, thread="t", graph=False)
    book.start(node, root, thread="t", graph=True)
    book.start(model, node, thread=None, graph=False)
    book.note(conserve, "c", run_id=model, thread=None)
    assert book.is_running("t")
    assert book.end(model) is None
    assert book.end(node) is None
    episode = book.end(root)
    assert episode is not None
    assert (list(episode.used), episode.graph, episode.interrupted) == ([(conserve, "c")], True, False)
    assert not book.is_running("t")
    assert book.seen() == [conserve]


def test_a_child_on_another_thread_is_an_episode_of_its_own() -> None:
    book, root, child = RunBook(), uuid4(), uuid4()
    book.start(root, None, thread="outer", graph=True)
    book.start(child, root, thread="inner", graph=True)
    book.interrupt(child)
    inner, outer = book.end(child), book.end(root)
    assert inner is not None
    assert outer is not None
    assert (inner.thread, inner.interrupted) == ("inner", True)
    assert (outer.thread, outer.interrupted) == ("outer", False)


def test_two_runs_of_a_thread_at_once_are_over_together() -> None:
    book, one, two = RunBook(), uuid4(), uuid4()
    book.start(one, None, thread="t", graph=True)
    book.start(two, None, thread="t", graph=True)
    assert book.end(one) is None
    assert book.is_running("t")
    assert book.end(two) is not None


def test_runs_left_behind_go_with_their_episode() -> None:
    book, root, straggler = RunBook(), uuid4(), uuid4()
    book.start(root, None, thread="t", graph=True)
    book.start(straggler, root, thread="t", graph=True)
    assert book.end(root) is not None
    assert book.end(straggler) is None
    book.interrupt(straggler)  # and what nobody knows any more disturbs nobody
    book.interrupt(None)


def test_a_turn_whose_run_is_not_known_counts_for_its_thread() -> None:
    book, root = RunBook(), uuid4()
    conserve = _as_conserve(Lot())
    book.note(conserve, "nobody", run_id=uuid4(), thread="t")
    book.start(root, None, thread="t", graph=True)
    book.note(conserve, "c", run_id=None, thread="t")
    book.note(conserve, "elsewhere", run_id=None, thread=None)
    episode = book.end(root)
    assert episode is not None
    assert list(episode.used) == [(conserve, "c")]


def test_runs_without_a_thread_do_not_meet() -> None:
    book, one, two = RunBook(), uuid4(), uuid4()
    book.start(one, None, thread=None, graph=True)
    book.start(two, None, thread=None, graph=True)
    assert book.end(one) is not None
    assert book.end(two) is not None


def test_runs_that_never_end_are_forgotten() -> None:
    book = RunBook(runs_max=10)
    first = uuid4()
    book.start(first, None, thread="first", graph=True)
    for number in range(10):
        book.start(uuid4(), None, thread=f"{number}", graph=True)
    assert not book.is_running("first")
    assert book.end(first) is None
    assert book.is_running("9")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_a_forked_child_starts_afresh() -> None:
    book, parking = RunBook(), Parking()
    lot = Lot()
    book.start(uuid4(), None, thread="t", graph=True)
    parking.park(_as_conserve(lot), "c", unless=lambda: False)
    child = os.fork()
    if child == 0:  # os._exit takes the number that says what was wrong
        fresh = Parking()._workers() is not None and parking._pool is None
        os._exit(0 if not book.is_running("t") and fresh else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_parking_happens_beside_the_caller(until: Until) -> None:
    lot = Lot()
    Parking().park(_as_conserve(lot), "c", unless=lambda: False)
    until(lambda: bool(lot.parked))
    ((conversation, thread),) = lot.parked
    assert conversation == "c"
    assert thread.startswith("conserve-park")


def test_what_goes_on_or_is_stale_is_not_parked(until: Until) -> None:
    now_s = [0.0]
    lot, last, gate = Lot(), Lot(), threading.Event()
    parking = Parking(clock_s=lambda: now_s[0])
    parking.park(_as_conserve(lot), "answered", unless=lambda: True)
    for _ in range(4):  # every worker waits, so that the next one grows old
        parking.park(_as_conserve(lot), "blocker", unless=lambda: gate.wait(60))
    parking.park(_as_conserve(lot), "stale", unless=lambda: False)
    now_s[0] = STALE_S + 1
    gate.set()
    parking.park(_as_conserve(last), "fresh", unless=lambda: False)
    until(lambda: bool(last.parked))
    parking._workers().shutdown(wait=True)
    assert lot.calls == 0


def test_a_broker_that_fails_disturbs_nobody(until: Until) -> None:
    parking, broken = Parking(), Lot(OSError("no route"))
    parking.park(_as_conserve(broken), "c", unless=lambda: False)
    parking._workers().shutdown(wait=True)
    assert broken.calls == 1
    parking.park(_as_conserve(broken), "c", unless=lambda: False)  # as at the end of the interpreter: nothing is taken
    assert broken.calls == 1


def test_handlers_are_copied_with_configs() -> None:
    handler = ConServeCallbackHandler()
    config: dict[str, Any] = {"callbacks": [handler]}
    assert deepcopy(config)["callbacks"] == [handler]

"""Objects that must start afresh in a forked child: locks, threads, sockets (gunicorn preload, multiprocessing)."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

__all__ = ["call_in_forked_child"]

_resets: list[weakref.WeakMethod[Callable[[], None]]] = []


def call_in_forked_child(reset: Callable[[], None]) -> None:
    """Call a bound method in every child this process forks, as long as its object lives.

    Called before any other code of the child, in the order of registration. Must not block: every lock that another
    thread held at the fork stays held for ever.
    """
    _resets[:] = [known for known in _resets if known() is not None]
    _resets.append(weakref.WeakMethod(reset))


def _run_resets() -> None:
    for known in tuple(_resets):
        reset = known()
        if reset is not None:
            reset()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_run_resets)

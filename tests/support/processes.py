"""Processes that tests make."""

from __future__ import annotations

import os
import traceback
import warnings

import pytest


@pytest.fixture
def fork_and_wait():
    """Run a function in a forked child; return its exit status, 0 when it did not raise."""

    def run(child) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # "multi-threaded process": that is the point
            pid = os.fork()
        if pid == 0:
            try:
                child()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return run

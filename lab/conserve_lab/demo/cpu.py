"""CPU time of some threads of this process, for the price of scheduling beside the work itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

_FIELDS_BEFORE_TIMES = 11
"""`utime` and `stime` are fields 14 and 15 of `/proc/.../stat`; 11 fields lie between the name and them (proc(5))."""


def thread_ids() -> set[int]:
    """Return the system's ids of all Python threads that run now."""
    return {thread.native_id for thread in threading.enumerate() if thread.native_id is not None}


def cpu_s(native_ids: Iterable[int]) -> float | None:
    """Return the CPU seconds that these threads used so far; None where the system does not tell (not Linux)."""
    ticks = 0
    for native_id in native_ids:
        path = Path(f"/proc/self/task/{native_id}/stat")
        try:
            after_name = path.read_text("ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        ticks += int(after_name[_FIELDS_BEFORE_TIMES]) + int(after_name[_FIELDS_BEFORE_TIMES + 1])
    return ticks / os.sysconf("SC_CLK_TCK")

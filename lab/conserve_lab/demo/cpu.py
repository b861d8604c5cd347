"""What the machine itself did meanwhile: CPU time of some threads, and how late a sleeping thread is woken."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from conserve_sdk.telemetry import percentile

LAG_INTERVAL_S = 0.02

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


def process_cpu_s(pid: int) -> float | None:
    """Return the CPU seconds that a process used so far; None where the system does not tell, or it has ended."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return sum(int(ticks) for ticks in after_name[_FIELDS_BEFORE_TIMES : _FIELDS_BEFORE_TIMES + 2]) / os.sysconf(
        "SC_CLK_TCK"
    )


class LagMeter:
    """Measures how late a thread is woken that asked for a short sleep; a context manager.

    On an idle machine that is well under a millisecond. A machine that is busy with other things, or an interpreter
    that has more to do than it can, shows here, and then in every time between tokens.
    """

    def __init__(self) -> None:
        self._late_ms: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._measure, name="conserve-lag-meter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def late_ms(self, percent: float) -> float | None:
        """Return that percentile of the delays; None without any."""
        found = percentile(self._late_ms, percent)
        return None if found is None else round(found, 1)

    def _measure(self) -> None:
        while not self._stop.is_set():
            before_s = time.monotonic()
            time.sleep(LAG_INTERVAL_S)
            self._late_ms.append((time.monotonic() - before_s - LAG_INTERVAL_S) * 1000)

"""CPU time of a server on this machine, all its processes together, as Linux tells it.

vLLM's metrics page shows the API server's process only; what spins (NIXL's progress thread) is in the engine core's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["cpu_seconds_behind"]

LISTEN = "0A"
PROC = Path("/proc")


def cpu_seconds_behind(port: int, *, proc: Path = PROC) -> float | None:
    """User and system time of the processes that listen on a port, and of all their descendants.

    Returns:
        None where that cannot be told: another system, or processes of another user.
    """
    sockets = {f"socket:[{inode}]" for inode in _listening(port, proc)}
    if not sockets:
        return None
    stats = dict(_stats(proc))
    family = {pid for pid in stats if _holds(proc / str(pid) / "fd", sockets)}
    if not family:
        return None
    while grown := {pid for pid, (parent, _) in stats.items() if parent in family} - family:
        family |= grown
    return sum(stats[pid][1] for pid in family) / os.sysconf("SC_CLK_TCK")


def _listening(port: int, proc: Path) -> Iterator[str]:
    """Inodes of the sockets that listen on the port (`man 5 proc_net_tcp`)."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (proc / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _stats(proc: Path) -> Iterator[tuple[int, tuple[int, int]]]:
    """Per process its parent and its CPU time in ticks (`man 5 proc_pid_stat`)."""
    for place in proc.glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            # The second field is the program's name in brackets, which may hold blanks and brackets.
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            yield int(place.name), (int(fields[1]), int(fields[11]) + int(fields[12]))


def _holds(descriptors: Path, sockets: set[str]) -> bool:
    with suppress(OSError):  # another user's, or it ended meanwhile
        for descriptor in descriptors.iterdir():
            with suppress(OSError):
                if str(descriptor.readlink()) in sockets:
                    return True
    return False

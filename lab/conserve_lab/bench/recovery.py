"""What it costs to come back with many leases, and what they weigh: each measured in a process of its own."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from conserve_broker.journal import Journal
from conserve_broker.service import BrokerService
from conserve_lab.bench.processes import rss_bytes
from conserve_lab.bench.stored_leases import specs_of
from conserve_lab.demo.errors import DemoError
from conserve_sdk.core import BrokerSettings
from conserve_sdk.tokens import SigningKey, TokenSigner

_BUDGET_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """One start of a broker on a journal.

    Attributes:
        cpu_s: CPU time of all threads, from opening the file to being able to grant.
        wall_s: the same on the clock, which other processes stretch.
        bytes_per_lease: what the process grew by, over the leases; nothing of it is shared with the file.
    """

    leases: int
    cpu_s: float
    wall_s: float
    bytes_per_lease: float


def recover(path: Path, engines: Sequence[Mapping[str, Any]]) -> Recovered:
    """Start a broker on this journal in a fresh process.

    Raises:
        DemoError: the process failed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, path, list(engines)), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(_BUDGET_S):
            found: Recovered = ours.recv()
            return found
    except EOFError:
        pass
    finally:
        process.kill()
        process.join()
    raise DemoError("the process that recovers leases failed")


def _measure(pipe: Connection, path: Path, engines: list[dict[str, Any]]) -> None:
    pipe.send(asyncio.run(_start(path, engines)))


async def _start(path: Path, engines: list[dict[str, Any]]) -> Recovered:
    gc.collect()
    before_bytes, cpu_s, wall_s = rss_bytes(os.getpid()), time.process_time(), time.perf_counter()
    service = BrokerService(
        BrokerSettings(leases_max=10_000_000, leases_per_tenant_max=10_000_000),
        engines=specs_of(engines),
        signer=TokenSigner([SigningKey(kid="bench", secret=b"nothing here is worth a better secret")]),
        journal=Journal.open(path),
        freeze_gc=True,
    )
    await service.start()
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    leases = service.core.lease_count()
    grown = rss_bytes(os.getpid()) - before_bytes
    await service.stop()
    return Recovered(
        leases=leases, cpu_s=round(cpu_s, 3), wall_s=round(wall_s, 3), bytes_per_lease=round(grown / max(leases, 1))
    )

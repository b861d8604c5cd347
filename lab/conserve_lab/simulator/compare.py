"""Many runs beside each other: workloads x loads x policies, each over several seeds, on all cores."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from conserve_lab.hardware import engine_kind
from conserve_lab.simulator.policies import Policy
from conserve_lab.simulator.run import simulate
from conserve_lab.simulator.summary import summarise
from conserve_lab.workloads import SHAPES, Conversation, WorkloadError, generate, load_conversations


class RunFailed(Exception):  # noqa: N818 -- says what happened
    """A run broke one of its own checks; the message holds the command that repeats it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A workload at a load on a fleet.

    Attributes:
        workload: a generated shape, or the path of a trace.
        per_s: conversations that arrive in a second, on average.
        conversations: how many; a trace with fewer starts over.
        turns_max: conversations are cut there; 0: never.
        engines: how many, each of `engine`.
    """

    workload: str
    per_s: float
    conversations: int = 255
    turns_max: int = 0
    engines: int = 4
    engine: str = "a40/qwen3-0.6b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run: a cell, a policy, a seed."""

    cell: Cell
    policy: Policy
    seed: int

    def command(self) -> str:
        """The command that repeats exactly this run."""
        cell = self.cell
        where = f"--workload {cell.workload}" if cell.workload in SHAPES else f"--trace {cell.workload}"
        return (
            f"conserve simulate compare {where} --load {cell.per_s:g} --policy {self.policy.name} "
            f"--conversations {cell.conversations} --turns {cell.turns_max} --engines {cell.engines} "
            f"--engine {cell.engine} --seed {self.seed} --seeds 1"
        )


def compare(arms: Sequence[Arm], *, processes: int, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """Run every arm and return one row per cell and policy: medians over its seeds, the spread of the two main ones.

    Args:
        arms: what to run.
        processes: how many at once.
        advance: called after each run.

    Raises:
        RunFailed: a run found itself wrong.
        WorkloadError: a trace cannot be used.
    """
    found: dict[Arm, dict[str, Any]] = {}
    if processes == 1:
        for arm in arms:
            found[arm] = run_arm(arm)
            advance()
    else:
        with ProcessPoolExecutor(processes) as pool:
            futures = {pool.submit(run_arm, arm): arm for arm in arms}
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                advance()
    groups: dict[tuple[Cell, str], list[dict[str, Any]]] = {}
    for arm in arms:
        groups.setdefault((arm.cell, arm.policy.name), []).append(found[arm])
    return [_row(cell, name, runs) for (cell, name), runs in groups.items()]


def run_arm(arm: Arm) -> dict[str, Any]:
    """Run one arm in this process; see `compare`."""
    kinds = [engine_kind(arm.cell.engine)] * arm.cell.engines
    conversations = conversations_of(arm.cell, seed=arm.seed)
    started_s = time.process_time()
    try:
        outcome = simulate(conversations, arm.policy, kinds, per_s=arm.cell.per_s, seed=arm.seed)
    except AssertionError as broken:
        raise RunFailed(f"{broken}; to repeat it: {arm.command()}") from broken
    spent_s = time.process_time() - started_s
    times_real = outcome.span_us / 1e6 / max(spent_s, 1e-9)
    return {**summarise(outcome), "cpu_s": round(spent_s, 3), "times_real_time": round(times_real, 1)}


def conversations_of(cell: Cell, *, seed: int) -> tuple[Conversation, ...]:
    """The conversations of a cell: generated, or from its trace, from a place that depends on the seed.

    Raises:
        WorkloadError: neither a shape nor a trace that can be read.
    """
    if cell.workload in SHAPES:
        found = generate(cell.workload, conversations=cell.conversations, seed=seed)
    else:
        try:
            trace = load_conversations(Path(cell.workload))
        except OSError as error:
            raise WorkloadError(
                f"{cell.workload!r} is no workload ({', '.join(SHAPES)}) and no readable file: {error.strerror}"
            ) from error
        found = tuple(_from(trace, start=(seed - 1) * cell.conversations, count=cell.conversations))
    return tuple(conversation.first(cell.turns_max) for conversation in found) if cell.turns_max else found


def _from(trace: Sequence[Conversation], *, start: int, count: int) -> Iterable[Conversation]:
    return islice((trace[(start + number) % len(trace)] for number in range(count)), count)


def _row(cell: Cell, policy: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "workload": Path(cell.workload).name,
        "load": cell.per_s,
        "policy": policy,
        "settings": {"engines": cell.engines, "engine": cell.engine, "seeds": len(runs)},
    }
    for key in runs[0]:
        known = [run[key] for run in runs if run[key] is not None]
        row[key] = statistics.median(known) if known else None
    for key in ("ttfet_p95_norm", "tbt_p99_ms"):
        known = [run[key] for run in runs if run[key] is not None]
        row[f"{key}_range"] = [min(known), max(known)] if known else None
    return row

"""Many runs beside each other: workloads x loads x policies, each over several seeds, on all cores."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from conserve_lab.hardware import engine_kind
from conserve_lab.simulator.faults import Fault, FaultKind
from conserve_lab.simulator.policies import Policy
from conserve_lab.simulator.run import simulate
from conserve_lab.simulator.saturation import saturation_per_s
from conserve_lab.simulator.summary import summarise
from conserve_lab.workloads import (
    SHAPES,
    Conversation,
    WorkloadError,
    generate,
    load_conversations,
    short_name,
    value_of,
    vary,
)


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
        variations: what is changed in them, or happens to them; see `conserve_lab.workloads.VARIATIONS`.
        saturation: `per_s` over what the fleet can take for ever, where it was chosen so.
        engines: how many, each of `engine`.
    """

    workload: str
    per_s: float
    conversations: int = 255
    turns_max: int = 0
    variations: tuple[str, ...] = ()
    saturation: float | None = None
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
        varied = "".join(f" --with {variation}" for variation in cell.variations)
        return (
            f"conserve simulate compare {where}{varied} --load {cell.per_s!r} --policy {self.policy.name} "
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
    groups: dict[tuple[Cell, Policy], list[dict[str, Any]]] = {}
    for arm in arms:
        groups.setdefault((arm.cell, arm.policy), []).append(found[arm])
    return [_row(cell, policy, runs) for (cell, policy), runs in groups.items()]


def run_arm(arm: Arm) -> dict[str, Any]:
    """Run one arm in this process; see `compare`."""
    kinds = [engine_kind(arm.cell.engine)] * arm.cell.engines
    conversations = conversations_of(arm.cell, seed=arm.seed)
    variations = arm.cell.variations
    started_s = time.process_time()
    try:
        outcome = simulate(
            conversations,
            arm.policy,
            kinds,
            per_s=arm.cell.per_s,
            seed=arm.seed,
            burst=round(max(value_of(variations, "burst"), default=1)),
            faults=tuple(
                Fault(kind=kind, at_us=round(at_s * 1e6)) for kind in FaultKind for at_s in value_of(variations, kind)
            ),
        )
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
    if cell.turns_max:
        found = tuple(conversation.first(cell.turns_max) for conversation in found)
    return vary(found, cell.variations, seed=seed)


def at_saturation(cell: Cell, times: Sequence[float]) -> list[Cell]:
    """The cell at so many times the load that its fleet can take for ever.

    Raises:
        WorkloadError: its conversations cannot be had.
    """
    full = saturation_per_s(conversations_of(cell, seed=1), engine_kind(cell.engine), engines=cell.engines)
    return [replace(cell, per_s=float(f"{full * each:.3g}"), saturation=each) for each in times]


def _from(trace: Sequence[Conversation], *, start: int, count: int) -> Iterable[Conversation]:
    return islice((trace[(start + number) % len(trace)] for number in range(count)), count)


def name_of(cell: Cell) -> str:
    """What a cell's workload is called in tables."""
    return " ".join([short_name(cell.workload), *cell.variations])


def _row(cell: Cell, policy: Policy, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "workload": name_of(cell),
        "load": cell.per_s,
        "policy": policy.name,
        "settings": {
            "engines": cell.engines,
            "prefillers": policy.prefillers(cell.engines),
            "engine": cell.engine,
            "seeds": len(runs),
            "conversations": cell.conversations,
            "saturation": cell.saturation,
            "decode_chunk": policy.decode_chunk,
            "prefill_chunk": policy.prefill_chunk if policy.prefill_share else None,
            "long_prefill_tokens": policy.long_prefill_tokens,
            "host_tier": policy.host_tier,
        },
    }
    for key in runs[0]:
        known = [run[key] for run in runs if run[key] is not None]
        row[key] = statistics.median(known) if known else None
    for key in ("ttfet_p95_norm", "tbt_p99_ms"):
        known = [run[key] for run in runs if run[key] is not None]
        row[f"{key}_range"] = [min(known), max(known)] if known else None
    return row

"""`conserve bench peers`: the same agents on the same emulated engines, through vllm-router and through ConServe."""

from __future__ import annotations

import asyncio
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from conserve_lab.bench.peer_arms import PeerArm, fleet_config, open_arm
from conserve_lab.bench.peer_table import markdown_table, printed_table
from conserve_lab.bench.router import NoRouter, router_binary
from conserve_lab.demo.errors import DemoError
from conserve_lab.demo.fleet_process import FleetProcess, FleetProcessError
from conserve_lab.live.fleet import LiveFleet
from conserve_lab.live.merge import merged, spreads
from conserve_lab.live.trial import Blow, Script, run_blow, run_trial
from conserve_lab.replay import Chosen, Pace, PromptWriter, tokens_per_word
from conserve_lab.workloads import poisson_arrivals

__all__ = ["PeerRun", "run_peers"]

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRun:
    """What every arm is given.

    Attributes:
        per_s: conversations that arrive in a second, on average.
        prefillers, decoders: engines of an arm with roles; an arm without has as many that do both.
        repetitions: each has every arm once, in an order that turns round every time.
        kill: also kill a decoder in the middle of a replay of its own.
        health_s: how often vllm-router looks whether an engine lives.
        retry_s: how long an agent waits before it asks for a failed turn again.
        give_up_s: how long it goes on doing so.
    """

    arms: tuple[PeerArm, ...]
    chosen: Chosen
    per_s: float
    prefillers: int = 1
    decoders: int = 3
    repetitions: int = 3
    kill: bool = True
    health_s: int = 2
    retry_s: float = 1.0
    give_up_s: float = 60.0
    time_scale: float = 1.0
    seed: int = 1

    def pace(self) -> Pace:
        """When conversations arrive: the same for every arm and repetition."""
        arrivals = poisson_arrivals(len(self.chosen.conversations), per_s=self.per_s, seed=self.seed)
        scaled = tuple(round(at_us * self.time_scale) for at_us in arrivals)
        return Pace(arrivals_us=scaled, gap_scale=self.time_scale, retry_s=self.retry_s, give_up_s=self.give_up_s)


@dataclass(slots=True)
class _Seen:
    """What one arm has shown so far."""

    steady: list[Figures] = field(default_factory=list)
    kills: list[Figures] = field(default_factory=list)


def run_peers(
    run: PeerRun, *, cache: Path, json_path: Path | None, markdown_path: Path | None, console: Console
) -> int:
    """Measure, print the table, write the figures: a list with one object an arm.

    Args:
        run: what to run.
        cache: where vllm-router is, or will be, installed.
        json_path: where the figures go.
        markdown_path: where the table goes.
        console: where the table goes.

    Returns:
        0; what was measured is no matter of success. Arms of a router that cannot be had are skipped, and say so.

    Raises:
        DemoError: engines or a broker did not start.
        OSError: a file cannot be written.
    """
    binary, reason = _router(run, cache)
    if reason:
        console.print(f"vllm-router skipped: {reason}", style="yellow")
    seen = {arm.name: _Seen() for arm in run.arms if binary or not arm.is_peer}
    playing = [arm for arm in run.arms if arm.name in seen]
    with ExitStack() as stack:
        process = stack.enter_context(FleetProcess())
        advance = stack.enter_context(_bar(console, run, arms=len(playing)))
        for number in range(run.repetitions):
            for arm in playing if number % 2 == 0 else playing[::-1]:
                _play(run, arm, seen[arm.name], number=number, process=process, binary=binary, advance=advance)
    found = [_arm_figures(run, arm, seen.get(arm.name), reason=reason) for arm in run.arms]
    _share_out(found)
    console.print(printed_table(found))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {json_path}")
    if markdown_path is not None:
        markdown_path.write_text(markdown_table(found), encoding="utf-8")
        console.print(f"written to {markdown_path}")
    return 0


def _router(run: PeerRun, cache: Path) -> tuple[Path | None, str]:
    if not any(arm.is_peer for arm in run.arms):
        return None, ""
    try:
        return router_binary(cache), ""
    except NoRouter as problem:
        return None, str(problem)


@contextmanager
def _bar(console: Console, run: PeerRun, *, arms: int) -> Iterator[Callable[[], object]]:
    """Show a bar of all turns; yields what to call after each. On a pipe nothing is shown."""
    turns = sum(len(given.turns) for given in run.chosen.conversations)
    columns = (TextColumn("turns"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("turns", total=turns * arms * run.repetitions * (2 if run.kill else 1))
        yield lambda: bar.advance(task)


def _play(
    run: PeerRun,
    arm: PeerArm,
    seen: _Seen,
    *,
    number: int,
    process: FleetProcess,
    binary: Path | None,
    advance: Callable[[], object],
) -> None:
    """One repetition of an arm: a quiet replay, and one in which a decoder is killed; each on cold engines."""
    config = fleet_config(arm, prefillers=run.prefillers, decoders=run.decoders, time_scale=run.time_scale)
    blows = (None, Blow(kill=process.kill)) if run.kill else (None,)
    for blow in blows:
        try:
            with process.fleet(config) as remote:
                fleet = LiveFleet(kind="emulated", model=remote.model, entries=remote.entries)
                found = asyncio.run(_trial(run, arm, fleet, binary=binary, blow=blow, number=number, advance=advance))
        except (FleetProcessError, NoRouter) as error:
            raise DemoError(f"{arm.name}: {error}") from error
        (seen.steady if blow is None else seen.kills).append(found)


async def _trial(
    run: PeerRun,
    arm: PeerArm,
    fleet: LiveFleet,
    *,
    binary: Path | None,
    blow: Blow | None,
    number: int,
    advance: Callable[[], object],
) -> Figures:
    ratio = await tokens_per_word(next(iter(fleet.urls.values())), model=fleet.model)
    writer = PromptWriter(tokens_per_word=ratio, salt=f"{run.seed}-{number}")
    script = Script(trace=run.chosen.conversations, pace=run.pace(), writer=writer)
    async with open_arm(arm, fleet, binary=binary, health_s=run.health_s) as opened:
        if blow is None:
            return await run_trial(opened, fleet, script, on_turn=advance)
        return await run_blow(opened, fleet, script, blow=blow, on_turn=advance)


def _arm_figures(run: PeerRun, arm: PeerArm, seen: _Seen | None, *, reason: str) -> Figures:
    head: Figures = {"arm": arm.name, "about": arm.about}
    if seen is None:
        return {**head, "skipped": reason}
    found = head | merged(seen.steady)
    if seen.kills:
        found["kill"] = merged(seen.kills)
    found["spread"] = spreads(seen.steady) | spreads(seen.kills, prefix="kill.") if seen.kills else spreads(seen.steady)
    found["repetitions"] = run.repetitions
    found["workload"] = _workload(run)
    found["machine"] = {"cpus": os.cpu_count(), "python": platform.python_version()}
    return found


def _workload(run: PeerRun) -> Figures:
    given = run.chosen.conversations
    return {
        "trace": run.chosen.trace,
        "conversations": len(given),
        "turns": sum(len(each.turns) for each in given),
        "prompt_tokens": sum(each.prompt_tokens(number) for each in given for number in range(len(each.turns))),
        "cut": run.chosen.cut,
        "conversations_per_s": run.per_s,
        "prefillers": run.prefillers,
        "decoders": run.decoders,
        "retry_s": run.retry_s,
        "router_health_check_s": run.health_s,
        "time_scale": run.time_scale,
        "seed": run.seed,
    }


def _share_out(found: Sequence[Figures]) -> None:
    """Say what the SDK costs in the driver's process: what the driver spends more than with a bare client."""
    bare = [arm["cpu_us_per_turn"]["driver"] for arm in found if "router" in arm.get("cpu_us_per_turn", {})]
    if not bare:
        return
    for arm in found:
        cpu = arm.get("cpu_us_per_turn", {})
        if "broker" in cpu:
            cpu["sdk_share"] = round(cpu["driver"] - sum(bare) / len(bare))

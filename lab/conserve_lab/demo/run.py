"""The whole demo: the workload three ways on engines with cold caches, the closing table, the JSON file."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_openai import ChatOpenAI
from pydantic import SecretStr
from rich.console import Console

from conserve_lab.demo.agent import AgentRun
from conserve_lab.demo.equality import Equality, compare_with_reference
from conserve_lab.demo.figures import Variant, figures
from conserve_lab.demo.fleets import FleetSource, RunningFleet, open_source
from conserve_lab.demo.report import as_json, print_report, write_json
from conserve_lab.demo.scripted import answering, calling
from conserve_lab.demo.settings import DemoSettings
from conserve_lab.demo.tasks import Task, make_tasks
from conserve_lab.demo.tools import Toolbox
from conserve_lab.demo.trial import Trial, run_trial
from conserve_lab.demo.workspace import Workspace

Figures = dict[str, Any]

BUSY_LAG_MS = 10.0
"""A machine that wakes its threads later than this is too busy to compare times on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of one variant."""

    figures: Figures
    fleet: RunningFleet
    runs: tuple[AgentRun, ...]


def run_demo(settings: DemoSettings, *, console: Console) -> int:
    """Run the demo and report it.

    Returns:
        0 when every assertion held, else 1.

    Raises:
        DemoError: it could not be run at all.
        OSError: the JSON file cannot be written.
    """
    started_s = time.monotonic()
    if settings.json_path is not None:
        settings.json_path.touch()  # better refused now than after the runs
    workload = settings.workload
    tasks = make_tasks(
        workload.conversations,
        seed=settings.seed,
        prompt_chars=workload.prompt_chars,
        arrivals_s=workload.arrivals_s,
        turns=workload.turns,
    )
    variants = list(Variant) if settings.comparisons else [Variant.CONSERVE]
    outcomes: dict[str, Outcome] = {}
    with open_source(settings, say=lambda line: console.print(line, style="dim", highlight=False)) as source:
        for variant in variants:
            outcomes[variant] = _run_variant(variant, settings, tasks, source=source, console=console)
        equality = _equality(source, outcomes[Variant.CONSERVE], settings)
    by_variant = {name: outcome.figures for name, outcome in outcomes.items()}
    judge(by_variant[Variant.CONSERVE], equality)
    print_report(
        console, by_variant, engine_counts={name: outcome.fleet.description for name, outcome in outcomes.items()}
    )
    about = _about(settings, outcomes, equality) | {"total_s": round(time.monotonic() - started_s, 1)}
    _say_closing(console, by_variant, about)
    if settings.json_path is not None:
        write_json(settings.json_path, as_json(by_variant, **about))
        console.print(f"figures written to {settings.json_path}", highlight=False)
    return 1 if any(found["errors"] for found in by_variant.values()) else 0


def _run_variant(
    variant: Variant, settings: DemoSettings, tasks: list[Task], *, source: FleetSource, console: Console
) -> Outcome:
    with source.fresh(variant) as fleet:
        trial = Trial(variant=variant, settings=settings, tasks=tasks)
        seen = asyncio.run(run_trial(trial, fleet, console=console))
        found = figures(seen)
        if fleet.kind == "vllm":
            # vLLM's own names for what the engines counted, beside the figures made from them.
            found["engine_transfers"] = seen.decoders.transfers
            found["engine_external_hit_tokens"] = seen.decoders.external_hit_tokens
        return Outcome(figures=found, fleet=fleet, runs=tuple(seen.runs))


def judge(found: Figures, equality: Equality | None) -> None:
    """Add to the demo's own errors what its run must show beyond the audit."""
    problems: list[str] = found["error_details"]
    if found["follow_up_turns_on_prefiller"]:
        problems.append(f"{found['follow_up_turns_on_prefiller']} follow-up turns touched a prefiller")
    if found["leases_migrated"] and found["migrations_per_migrated_lease"] != 1:
        problems.append(f"{found['migrations_per_migrated_lease']} migrations per migrated lease instead of 1")
    if found["follow_up_turns"] and not found["follow_up_cached_token_share"]:
        problems.append("no follow-up turn hit its decoder's prefix cache")
    if equality is not None:
        problems.extend(f"answers differ: {difference}" for difference in equality.differences)
    found["errors"] = len(problems)


def _equality(source: FleetSource, outcome: Outcome, settings: DemoSettings) -> Equality | None:
    """Compare with the reference server, where there is one."""
    if source.reference_url is None or outcome.fleet.call_bias is None:
        return None
    # Streamed like the agents' own calls: vLLM parses a call that was cut off differently when it streams.
    model = ChatOpenAI(
        model=outcome.fleet.model,
        base_url=f"{source.reference_url}/v1",
        api_key=SecretStr("EMPTY"),
        streaming=True,
    )
    with tempfile.TemporaryDirectory(prefix="conserve-demo-") as folder:
        tools = Toolbox(Workspace(Path(folder) / "w", seed=0)).tools()  # their schemas are all that is needed
    return asyncio.run(
        compare_with_reference(
            [run for run in outcome.runs if not run.error],
            caller=calling(model, tools, call_bias=outcome.fleet.call_bias),
            speaker=answering(model, tools, answer_tokens=settings.workload.answer_tokens),
        )
    )


def _about(settings: DemoSettings, outcomes: Mapping[str, Outcome], equality: Equality | None) -> dict[str, Any]:
    """What the figures were measured on."""
    about: dict[str, Any] = {
        "seed": settings.seed,
        "engines": {name: outcome.fleet.description for name, outcome in outcomes.items()},
        "cpus": os.cpu_count(),
    }
    if equality is not None:
        about["greedy_equal_turns"] = equality.equal
        about["greedy_compared_turns"] = equality.compared
        about["greedy_unstable_turns"] = equality.unstable
    return about


def _say_closing(console: Console, by_variant: Mapping[str, Figures], about: Mapping[str, Any]) -> None:
    found = by_variant[Variant.CONSERVE]
    if max(other["machine_lag_ms"] or 0 for other in by_variant.values()) > BUSY_LAG_MS:
        console.print(
            "This machine was busy: the counts hold, the times of the runs cannot be compared.", style="yellow"
        )
    if "greedy_compared_turns" in about:
        console.print(
            f"greedy answers equal to the aggregated server: {about['greedy_equal_turns']} of "
            f"{about['greedy_compared_turns']} turns",
            highlight=False,
        )
    if not found["errors"]:
        console.print(
            f"Every migrated conversation moved its KV {found['migrations_per_migrated_lease'] or 0:.2f} times; "
            f"{found['follow_up_turns_on_prefiller']} of {found['follow_up_turns']} follow-up turns touched a "
            f"prefiller. {about['total_s']} s in all.",
            highlight=False,
        )

"""`conserve bench sdk`: what the SDK adds to a follow-up turn, a first turn, a stream, and a new client."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from conserve_lab.bench.arms import (
    Arm,
    async_arm,
    async_over_transport,
    async_straight,
    bare_arm,
    router_arm,
    sdk_arm,
    transport_arm,
)
from conserve_lab.bench.blocks import Block, Load, median_difference, play, spread_of, stream
from conserve_lab.bench.router import NoRouter, router_binary, running_router
from conserve_lab.bench.stack_process import StackProcess
from conserve_lab.demo.errors import DemoError
from conserve_sdk import ConServe

__all__ = ["GOALS", "run_sdk_bench"]

GOALS = {"added_p50_ms": 0.3, "added_cpu_us_per_turn": 200.0, "streaming_rate_ratio": 0.97, "extra_connections": 0}
"""At most; `streaming_rate_ratio`: at least."""

Figures = dict[str, Any]


@dataclass(slots=True)
class _Run:
    """What one arm has shown so far."""

    arm: Arm
    blocks: list[Block] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    chunk_us: list[float] = field(default_factory=list)
    connections: int = 0
    requests: int = 0


def run_sdk_bench(
    *,
    blocks: int,
    turns: int,
    streams: int,
    peer: bool,
    cache: Path,
    json_path: Path,
    console: Console,
    load: Load | None = None,
) -> int:
    """Measure, print the table, write the figures.

    Args:
        blocks: conversations per arm.
        turns: follow-up turns in each.
        streams: streamed answers per arm.
        peer: measure vllm-router too, if it can be had.
        cache: where vllm-router is, or will be, installed.
        json_path: where the figures go.
        console: where the table goes.
        load: what each turn is; default: 6,000 characters, answers of 8 tokens, streams of 200.

    Returns:
        0; what was measured is no matter of success.

    Raises:
        DemoError: the stack did not start, or a turn failed.
        OSError: the file cannot be written.
    """
    before = os.getloadavg()
    with ExitStack() as stack:
        engines = stack.enter_context(StackProcess(answer_tokens=(load or Load(model="", turns=0)).chunks))
        given = load or Load(model=engines.at.model, turns=turns)
        conserve = stack.enter_context(ConServe(engines.at.broker_url))
        arms = [bare_arm(engines.at.decoder), sdk_arm(conserve), transport_arm(conserve)]
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        stack.callback(lambda: loop.run_until_complete(loop.shutdown_asyncgens()))
        twins = [
            async_arm(arms[0], loop, async_straight(engines.at.decoder)),
            async_arm(arms[1], loop, conserve.async_openai_client(max_retries=0)),
            async_arm(arms[2], loop, async_over_transport(conserve)),
        ]
        skipped = "" if peer else "not asked for"
        if peer:
            try:
                router = stack.enter_context(running_router(router_binary(cache), engines.at))
                arms.append(router_arm(router.url, cpu_s=router.cpu_s))
                twins.append(async_arm(arms[3], loop, async_straight(router.url)))
            except NoRouter as reason:
                skipped = str(reason)
                console.print(f"vllm-router skipped: {reason}", style="yellow")
        for arm in (*arms, *twins):
            stack.callback(arm.close)
        runs, aruns = [_Run(arm) for arm in arms], [_Run(arm) for arm in twins]
        try:
            for those in (runs, aruns):
                _measure(those, given, engines, blocks=blocks, streams=streams, console=console)
        except openai.OpenAIError as error:
            raise DemoError(f"a turn failed: {type(error).__name__}: {error}") from error
        init_ms = _init_ms(conserve)
    found = _figures(runs, given, skipped=skipped)
    found["async"] = _figures(aruns, given, skipped=skipped)
    found |= {"client_init_ms": init_ms, "load": _load(given, before)}
    console.print(_table(found, title="blocking clients", init_ms=init_ms))
    console.print(_table(found["async"], title="async clients"))
    json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {json_path}")
    return 0


def _measure(
    runs: list[_Run], load: Load, engines: StackProcess, *, blocks: int, streams: int, console: Console
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        engines.engine_requests()
        for run in runs:  # a warm connection, and code that was run before
            play([run.arm], load, number=0)
            run.requests = engines.engine_requests().total()
        task = progress.add_task("follow-up turns", total=blocks)
        for number in range(1, blocks + 1):
            in_turn = _in_turn(runs, number)
            for run, block in zip(in_turn, play([run.arm for run in in_turn], load, number=number), strict=True):
                run.blocks.append(block)
                run.connections += block.connections
            progress.advance(task)
        task = progress.add_task("streamed answers", total=streams * len(runs))
        for number in range(streams):
            for run in _in_turn(runs, number):
                rate, chunk_us = stream(run.arm, load, number=number)
                run.rates.append(rate)
                run.chunk_us.append(chunk_us)
                progress.advance(task)


def _in_turn(runs: list[_Run], number: int) -> list[_Run]:
    """Every other round the other way round: being first is no advantage."""
    return runs if number % 2 else runs[::-1]


def _init_ms(conserve: ConServe) -> dict[str, float | int]:
    """What one more client costs once there is a first."""
    taken = []
    for _ in range(50):
        started_s = time.perf_counter()
        client = conserve.openai_client()
        taken.append((time.perf_counter() - started_s) * 1000)
        client.close()
    return spread_of(taken)


def _figures(runs: list[_Run], load: Load, *, skipped: str) -> Figures:
    bare, sdk, transport, *others = runs
    figures = _compared(sdk, bare, load)
    figures["goals"] = GOALS
    figures["bare"] = {
        "follow_up_ms": spread_of([each for block in bare.blocks for each in block.follow_up_ms]),
        "cpu_us_per_turn": spread_of([each for block in bare.blocks for each in block.cpu_us], digits=0),
        "chunks_per_s": spread_of(bare.rates, digits=0),
        "cpu_us_per_chunk": spread_of(bare.chunk_us, digits=1),
    }
    figures["transport_only"] = _compared(transport, bare, load)
    figures["peer"] = {"name": "vllm-router", **_compared(others[0], bare, load)} if others else {"skipped": skipped}
    return figures


def _compared(run: _Run, bare: _Run, load: Load) -> Figures:
    pairs = list(zip(run.blocks, bare.blocks, strict=True))
    added_ms = [median_difference(mine.follow_up_ms, its.follow_up_ms) for mine, its in pairs]
    added_us = [median_difference(mine.cpu_us, its.cpu_us) + mine.background_us_per_turn for mine, its in pairs]
    ratios = [mine / its for mine, its in zip(run.rates, bare.rates, strict=True)]
    firsts = [[block.first_ms for block in each.blocks] for each in (run, bare)]
    return {
        "added_p50_ms": round(statistics.median(added_ms), 3),
        "added_cpu_us_per_turn": round(statistics.median(added_us), 1),
        "streaming_rate_ratio": round(statistics.median(ratios), 3),
        "background_cpu_us_per_turn": round(statistics.median(block.background_us_per_turn for block in run.blocks), 1),
        "cpu_us_per_chunk": round(statistics.median(run.chunk_us), 1),
        "extra_connections": run.connections - bare.connections,
        "added_first_turn_ms": round(median_difference(*firsts), 3),
        "engine_requests_per_turn": round(run.requests / (load.turns + 1), 3),
        "spread": {
            "added_p50_ms": spread_of(added_ms),
            "added_cpu_us_per_turn": spread_of(added_us, digits=0),
            "streaming_rate_ratio": spread_of(ratios),
            "cpu_us_per_chunk": spread_of(run.chunk_us, digits=1),
        },
    }


def _load(load: Load, before: tuple[float, float, float]) -> Figures:
    return {
        "turns_per_conversation": load.turns + 1,
        "prompt_chars": load.prompt_chars,
        "answer_tokens": load.answer_tokens,
        "chunks": load.chunks,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_average_before": before,
        "load_average_after": os.getloadavg(),
    }


def _table(found: Figures, *, title: str, init_ms: Figures | None = None) -> Table:
    table = Table(title=f"{title}: added to a bare openai one, medians [quartiles of the blocks]")
    peer, transport = found["peer"], found["transport_only"]
    for column in ("", "conserve_sdk", "goal", "transport only", "vllm-router"):
        table.add_column(column, justify="left" if not column else "right")
    for key in ("added_p50_ms", "added_cpu_us_per_turn", "streaming_rate_ratio", "extra_connections"):
        goal = f"{'>=' if key == 'streaming_rate_ratio' else '<='} {found['goals'][key]}"
        table.add_row(key, _cell(found, key), goal, _cell(transport, key), _cell(peer, key))
    bare = found["bare"]["cpu_us_per_chunk"]["p50"]
    for key in ("cpu_us_per_chunk", "background_cpu_us_per_turn", "added_first_turn_ms", "engine_requests_per_turn"):
        goal = f"(bare: {bare})" if key == "cpu_us_per_chunk" else ""
        table.add_row(key, _cell(found, key), goal, _cell(transport, key), _cell(peer, key))
    if init_ms is not None:
        table.add_row("client_init_ms", str(init_ms["p50"]), "<= 5", "", "")
    return table


def _cell(figures: Figures, key: str) -> str:
    if key not in figures:
        return "-"
    spread = figures["spread"].get(key)
    return f"{figures[key]} [{spread['p25']} .. {spread['p75']}]" if spread else str(figures[key])

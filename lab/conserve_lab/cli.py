"""`conserve demo`, `conserve bench`, `conserve emulate`: each a function from arguments to an exit code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from conserve_lab._command import run_command, run_commands
from conserve_lab.bench.commands import LIVE_COMMANDS

__all__ = ["bench_main", "demo_main", "emulate_main", "lab_main", "named_benches", "simulate_main"]


class Engine(StrEnum):
    """Engines the demo can run on."""

    EMULATED = "emulated"
    VLLM = "vllm"


class Preset(StrEnum):
    """Presets of the broker's placement."""

    DEFAULT = "default"
    PAPER = "paper"
    AFFINITY = "affinity"


Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Plain = Annotated[bool, typer.Option("--plain", help="Lines instead of a live screen (chosen by itself in a pipe).")]
TimeScale = Annotated[
    float, typer.Option(min=0.0, max=100.0, help="Multiplies every duration of the emulated engines; 0: no waiting.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the workload.")]


def demo_main(argv: Sequence[str]) -> int:
    """Run `conserve demo`."""
    return run_command(_demo, argv, name="conserve demo")


def bench_main(argv: Sequence[str]) -> int:
    """Run `conserve bench`, or one of its named measurements (`conserve bench NAME`)."""
    named = named_benches()
    if argv and argv[0] in named:
        return run_command(named[argv[0]], argv[1:], name=f"conserve bench {argv[0]}")
    return run_command(_bench, argv, name="conserve bench")


def named_benches() -> dict[str, Callable[..., int]]:
    """The measurements of `conserve bench NAME`."""
    return {
        "broker": _bench_broker,
        "failover": _failover,
        "sdk": _bench_sdk,
        "soak": _bench_soak,
        **LIVE_COMMANDS,
    }


def lab_main(argv: Sequence[str]) -> int:
    """Run `conserve lab`."""
    return run_commands({"calibrate": _calibrate}, argv, name="conserve lab")


def simulate_main(argv: Sequence[str]) -> int:
    """Run `conserve simulate`."""
    return run_commands({"compare": _compare, "paper": _paper}, argv, name="conserve simulate")


def emulate_main(argv: Sequence[str]) -> int:
    """Run `conserve emulate`."""
    from conserve_lab.emulator.command import emulate_main as emulate

    return emulate(argv)


def _demo(
    *,
    engine: Annotated[
        Engine, typer.Option(help="Emulated engines, or real vLLM on this machine's CPU.")
    ] = Engine.EMULATED,
    conversations: Annotated[
        int | None, typer.Option(min=1, max=500, help="How many agents. Default: 24, vLLM 8.")
    ] = None,
    json: Json = None,
    plain: Plain = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Keep broker and emulated fleet up for your own agent.")
    ] = False,
    preset: Annotated[Preset | None, typer.Option(help="Placement. Default: default; vLLM paper.")] = None,
    seed: Seed = 1,
    compare: Annotated[bool, typer.Option(help="Run the workload per turn and with affinity too.")] = True,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Broker's port with --serve.")] = 7070,
    vllm_venv: Annotated[Path | None, typer.Option(help="Environment that holds vLLM. Default: .venv-vllm")] = None,
    time_scale: TimeScale = 1.0,
) -> int:
    """Broker, engines and real LangGraph agents: one KV transfer per conversation, measured.

    Exit code 1 when an assertion of the demo failed.
    """
    from conserve_lab.demo.run import run_demo
    from conserve_lab.demo.serve import serve as serve_until
    from conserve_lab.demo.settings import demo_settings

    console = _console()
    settings = demo_settings(
        engine.value,
        conversations=conversations,
        preset=preset.value if preset else None,
        seed=seed,
        plain=plain or not console.is_terminal,
        comparisons=compare,
        json_path=json,
        vllm_venv=vllm_venv,
        time_scale=time_scale,
    )
    if not serve:
        return run_demo(settings, console=console)
    if engine is not Engine.EMULATED:
        raise typer.BadParameter("--serve keeps an emulated fleet up: leave out --engine vllm")
    serve_until(settings, console=console, stop=_until_interrupted(), port=port)
    return 0


def _bench(
    *,
    json: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = Path("bench.json"),
    markdown: Annotated[Path, typer.Option(help="Where the table goes.")] = Path("bench.md"),
    seeds: Annotated[int, typer.Option(min=1, max=50, help="How many seeds, from 1 on.")] = 3,
    conversations: Annotated[int, typer.Option(min=1, max=500, help="Conversations of one run.")] = 24,
    time_scale: TimeScale = 1.0,
) -> int:
    """All presets and the per-turn baseline beside each other on the emulated fleet, over several seeds.

    Other measurements, each with a --help of its own: `conserve bench` ...

    broker (grants, renewals, recovery),
    emulator (how true its clock is),
    failover (of the leading broker),
    hold (KV held between turns, on real vLLM),
    peers (beside vllm-router),
    replay (a trace on engines that compute),
    sdk (what the client costs),
    soak (agents while engines and leaders die).
    """
    from conserve_lab.demo.bench import run_bench

    return run_bench(
        seeds=range(1, seeds + 1),
        conversations=conversations,
        json_path=json,
        markdown_path=markdown,
        console=_console(),
        time_scale=time_scale,
    )


def _compare(
    *,
    workload: Annotated[list[str] | None, typer.Option(help="A generated workload; may be repeated.")] = None,
    trace: Annotated[
        list[str] | None, typer.Option(help="A trace: a file (JSONL, .gz too) or its name; may be repeated.")
    ] = None,
    traces: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of traces. Default: $CONSERVE_TRACES.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="A policy, NAME@CHUNK or NAME@PREFILL/DECODE; may be repeated. Default: all."),
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Each policy with decode chunks of 512 to 8192.")] = False,
    load: Annotated[
        list[float] | None, typer.Option(min=0.001, help="Conversations a second; may be repeated.")
    ] = None,
    of_saturation: Annotated[
        list[float] | None,
        typer.Option(min=0.01, max=100.0, help="Times what the fleet can take; may be repeated. Default: 0.5, 1, 2."),
    ] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option("--with", help="tools, shared, giant, skew, burst, fail or drain=NUMBER; may be repeated."),
    ] = None,
    conversations: Annotated[int, typer.Option(min=1, max=100_000, help="Conversations of one run.")] = 255,
    turns: Annotated[int, typer.Option(min=0, help="Cut conversations after so many turns; 0: never.")] = 0,
    engines: Annotated[int, typer.Option(min=1, max=256, help="Engines of the fleet.")] = 4,
    engine: Annotated[str, typer.Option(help="GPU/MODEL of each engine.")] = "a40/qwen3-0.6b",
    seeds: Annotated[int, typer.Option(min=1, max=100, help="How many seeds.")] = 3,
    seed: Annotated[int, typer.Option(min=1, help="The first of them.")] = 1,
    processes: Annotated[int | None, typer.Option(min=1, help="Runs at once. Default: one a core.")] = None,
    json: Json = None,
    html: Annotated[Path | None, typer.Option(help="Write the report (one file, fronts and tables) here.")] = None,
) -> int:
    """Policies beside each other in virtual time: the production placement on simulated engines."""
    from conserve_lab.simulator.command import cells_of, chosen_policies, run_compare, swept
    from conserve_lab.simulator.compare import Cell
    from conserve_lab.simulator.policies import POLICIES
    from conserve_lab.workloads import SHAPES, parse_variation, trace_path

    unknown = sorted(set(workload or []) - set(SHAPES))
    if unknown:
        raise typer.BadParameter(f"no workload {unknown[0]!r}: choose from {', '.join(SHAPES)}, or use --trace FILE")
    for variation in with_ or []:
        parse_variation(variation)
    found = [str(trace_path(name, folder=traces)) for name in trace or []]
    cells = [
        Cell(
            workload=name,
            per_s=1.0,
            variations=tuple(with_ or []),
            conversations=conversations,
            turns_max=turns,
            engines=engines,
            engine=engine,
        )
        for name in [*(workload or []), *found] or list(SHAPES)
    ]
    policies = chosen_policies(policy or list(POLICIES))
    return run_compare(
        cells_of(cells, loads=load or [], times=of_saturation or ([] if load else [0.5, 1.0, 2.0])),
        swept(policies) if sweep else policies,
        seeds=range(seed, seed + seeds),
        json_path=json,
        html_path=html,
        processes=processes,
        console=_console(),
    )


def _paper(
    *,
    trace: Annotated[
        str | None, typer.Option(help="The paper's workload as a trace. Default: generated conversations like it.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=50, help="How many seeds.")] = 3,
    processes: Annotated[int | None, typer.Option(min=1, help="Runs at once. Default: one a core.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw figures like the paper's here (.png or .svg).")] = None,
    json: Json = None,
) -> int:
    """The paper's experiment in virtual time, counted as its code counts and from arrival, beside its figures."""
    from conserve_lab.simulator.paper_command import run_paper_command

    return run_paper_command(
        trace or "swe-padded",
        seeds=range(1, seeds + 1),
        processes=processes,
        figure=figure,
        json_path=json,
        console=_console(),
    )


def _calibrate(
    *,
    cells: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="File of measured cells.")] = None,
    prefill_column: Annotated[str, typer.Option(help="Column with the prefill times in seconds.")] = "first_token_s",
    engine: Annotated[str, typer.Option(help="URL of an engine to measure, instead of --cells.")] = "",
    local_vllm: Annotated[Path | None, typer.Option(help="Start one vLLM of this environment, on the CPU.")] = None,
    save_cells: Annotated[Path | None, typer.Option(help="Write what was measured here, for --cells.")] = None,
    conversations: Annotated[int, typer.Option(min=1, max=1_000, help="Conversations to predict.")] = 20,
    repetitions: Annotated[int, typer.Option(min=1, max=100, help="How often each cell is measured.")] = 5,
    batched_tokens: Annotated[int, typer.Option(min=1, help="The engine's max_num_batched_tokens.")] = 2_048,
    max_seqs: Annotated[int, typer.Option(min=1, help="The engine's max_num_seqs.")] = 32,
    json: Json = None,
) -> int:
    """Fit the engine model to measured cells and print the error of each; or measure an engine that runs.

    A live engine is fitted on half of its cells, judged by the other half, and by the TTFT of replayed conversations.
    Exit code 1 when a cell is off by more than 15 %, or all are by more than 5 % on average.
    """
    if sum(map(bool, (cells, engine, local_vllm))) != 1:
        raise typer.BadParameter("say what to fit to: --cells FILE, --engine URL, or --local-vllm VENV")
    if cells is not None:
        from conserve_lab.calibration.command import run_calibrate

        return run_calibrate(cells, prefill_column=prefill_column, json_path=json, console=_console())
    from conserve_lab.bench.commands import calibrate_live

    return calibrate_live(
        engine,
        local_vllm,
        conversations=conversations,
        repetitions=repetitions,
        batched_tokens=batched_tokens,
        max_seqs=max_seqs,
        cells_path=save_cells,
        json_path=json,
    )


def _failover(
    *,
    json: Json = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Kills and planned ends, each.")] = 5,
    lock_ttl_ms: Annotated[int, typer.Option(min=500, max=60_000, help="Life of the leader's lock.")] = 1_500,
    leases: Annotated[int, typer.Option(min=0, max=500_000, help="Live leases to take over.")] = 0,
) -> int:
    """How long new conversations wait when the leading broker of two is killed, or ends by plan."""
    from conserve_lab.failover import run_failover

    return run_failover(rounds=rounds, lock_ttl_ms=lock_ttl_ms, leases=leases, json_path=json, console=_console())


def _bench_broker(
    *,
    json: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = Path("bench-broker.json"),
    slices: Annotated[int, typer.Option(min=1, max=1_000, help="Slices of grants, and of the bare server.")] = 8,
    slice_s: Annotated[float, typer.Option(min=0.05, max=600.0, help="Length of one.")] = 2.0,
    connections: Annotated[int, typer.Option(min=1, max=1_000, help="Kept open by the load.")] = 32,
    leases: Annotated[int, typer.Option(min=50, max=1_000_000, help="Live leases meanwhile.")] = 100_000,
    million: Annotated[bool, typer.Option("--million", help="Recover and weigh a million leases, too.")] = False,
    scrape_s: Annotated[float, typer.Option(min=0.0, max=600.0, help="Watch 64 engines so long; 0: do not.")] = 15.0,
    failovers: Annotated[int, typer.Option(min=0, max=100, help="Kills and planned ends, each.")] = 4,
) -> int:
    """What grants, reports and renewals cost beside the bare server; recovery, memory, failover, scraping."""
    from conserve_lab.bench.broker import BrokerBench, run_broker_bench

    bench = BrokerBench(
        slices=slices,
        slice_s=slice_s,
        connections=connections,
        leases=leases,
        million=million,
        scrape_s=scrape_s,
        failovers=failovers,
    )
    return run_broker_bench(bench, json_path=json, console=_console())


def _bench_soak(
    *,
    json: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = Path("bench-soak.json"),
    minutes: Annotated[float, typer.Option(min=0.1, max=10_000, help="How long.")] = 10.0,
    agents: Annotated[int, typer.Option(min=1, max=10_000, help="Agents at once.")] = 500,
    think_s: Annotated[float, typer.Option(min=0.0, max=600.0, help="Mean pause between two turns.")] = 30.0,
    engine_fault_s: Annotated[float, typer.Option(min=0.5, max=3_600, help="An engine dies every so often.")] = 40.0,
    leader_kills: Annotated[int, typer.Option(min=0, max=100, help="How often the leading broker is killed.")] = 2,
    plain: Plain = False,
) -> int:
    """Agents on emulated engines and replicated brokers while engines and leaders die: what is lost, wrong, leaked.

    Exit code 1 when anything is.
    """
    from conserve_lab.bench.soak import Soak, run_soak

    soak = Soak(
        seconds=60 * minutes, agents=agents, think_s=think_s, engine_fault_s=engine_fault_s, leader_kills=leader_kills
    )
    console = _console()
    return run_soak(soak, json_path=json, console=console, live=console.is_terminal and not plain)


def _bench_sdk(
    *,
    json: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = Path("bench-sdk.json"),
    blocks: Annotated[int, typer.Option(min=1, max=1_000, help="Conversations per client.")] = 20,
    turns: Annotated[int, typer.Option(min=1, max=1_000, help="Follow-up turns of each conversation.")] = 20,
    streams: Annotated[int, typer.Option(min=1, max=1_000, help="Streamed answers per client.")] = 20,
    peer: Annotated[bool, typer.Option(help="Measure vllm-router too; it is installed from PyPI when missing.")] = True,
    cache: Annotated[Path, typer.Option(help="Where vllm-router is installed.")] = Path(".cache"),
) -> int:
    """What the SDK adds to a bare openai client on the same emulated engines, beside what vllm-router adds."""
    from conserve_lab.bench.sdk import run_sdk_bench

    return run_sdk_bench(
        blocks=blocks, turns=turns, streams=streams, peer=peer, cache=cache, json_path=json, console=_console()
    )


def _console() -> Console:
    """Return the console; a pipe has no width, so it gets one in which tables need not wrap."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def _until_interrupted() -> threading.Event:
    """Return an event that SIGINT and SIGTERM set."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop

"""`conserve demo`, `conserve bench`, `conserve emulate`: each a function from arguments to an exit code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from conserve_lab._command import run_command

__all__ = ["bench_main", "demo_main", "emulate_main"]


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
    """Run `conserve bench`, or `conserve bench sdk`."""
    if list(argv[:1]) == ["sdk"]:
        return run_command(_bench_sdk, argv[1:], name="conserve bench sdk")
    return run_command(_bench, argv, name="conserve bench")


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

    `conserve bench sdk` measures what the SDK itself costs; see its own --help.
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

"""The measurements of `conserve bench` in wall time, on engines that compute or pretend to: their options."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from conserve_lab.live.policy import Policy

if TYPE_CHECKING:
    from conserve_lab.live.fleet import LiveFleet

_CONTEXT_PERCENT = 90
"""How much of the engines' context a conversation may come to: words are not tokens, and a template adds some."""

Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Trace = Annotated[str, typer.Option(help="A trace file (JSONL, .gz too), or the name of a generated workload.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of arrivals and generated workloads.")]
Turns = Annotated[int, typer.Option(min=0, help="Cut conversations after so many turns; 0: never.")]
Answers = Annotated[int, typer.Option(min=0, help="Cut answers after so many tokens; 0: never.")]
PerS = Annotated[float, typer.Option(min=0.001, help="Conversations that arrive in a second.")]


def _peers(
    *,
    json: Json = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="An arm; may be repeated. Default: all.")] = None,
    trace: Trace = "coding",
    conversations: Annotated[int, typer.Option(min=1, max=1_000, help="Conversations of one replay.")] = 16,
    turns: Turns = 5,
    answer_tokens: Answers = 120,
    per_s: PerS = 1.6,
    prefillers: Annotated[int, typer.Option(min=1, max=32, help="Prefillers of arms that have them.")] = 1,
    decoders: Annotated[int, typer.Option(min=1, max=32, help="Their decoders.")] = 3,
    repetitions: Annotated[int, typer.Option(min=1, max=100, help="How often, arms taking turns.")] = 3,
    kill: Annotated[bool, typer.Option(help="Also kill a decoder in the middle, in a replay of its own.")] = True,
    router_health_s: Annotated[int, typer.Option(min=1, help="vllm-router's health check; its own default: 60.")] = 2,
    give_up_s: Annotated[float, typer.Option(min=0.0, help="How long an agent asks again, once a second.")] = 60.0,
    time_scale: Annotated[float, typer.Option(min=0.0, max=100.0, help="Multiplies the engines' durations.")] = 1.0,
    seed: Seed = 1,
    cache: Annotated[Path, typer.Option(help="Where vllm-router is installed from PyPI.")] = Path(".cache"),
) -> int:
    """The same agents on the same emulated engines, through vllm-router and through ConServe, in wall time.

    vllm-router is installed at run time into an environment of its own; without it its arms are skipped.
    """
    from conserve_lab.bench.peer_arms import ARMS
    from conserve_lab.bench.peers import PeerRun, run_peers
    from conserve_lab.replay import choose_conversations

    known = {each.name: each for each in ARMS}
    if unknown := [name for name in arm or () if name not in known]:
        raise typer.BadParameter(f"no arm {unknown[0]!r}: choose from {', '.join(known)}")
    run = PeerRun(
        arms=tuple(known[name] for name in arm or known),
        chosen=choose_conversations(
            trace,
            count=conversations,
            turns_max=turns,
            output_tokens_max=answer_tokens,
            context_tokens_max=32_000,
            seed=seed,
        ),
        per_s=per_s,
        prefillers=prefillers,
        decoders=decoders,
        repetitions=repetitions,
        kill=kill,
        health_s=router_health_s,
        give_up_s=give_up_s,
        time_scale=time_scale,
        seed=seed,
    )
    return run_peers(run, cache=cache, json_path=json, markdown_path=markdown, console=_console())


def _replay(
    *,
    trace: Trace = "coding",
    policy: Annotated[list[Policy] | None, typer.Option(help="May be repeated. Default: all three.")] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="ROLE=URL, role prefiller, decoder or both; repeat for each engine.")
    ] = None,
    broker: Annotated[str, typer.Option(help="A broker that runs, and its engines, instead of --engine.")] = "",
    local_vllm: Annotated[
        Path | None, typer.Option(help="Start one prefiller and two decoders of vLLM in this environment, on the CPU.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Preset of the broker under policy conserve.")] = "default",
    conversations: Annotated[int, typer.Option(min=1, max=10_000, help="Conversations of one replay.")] = 8,
    turns: Turns = 5,
    answer_tokens: Answers = 60,
    per_s: PerS = 0.5,
    repetitions: Annotated[int, typer.Option(min=1, max=100, help="How often, policies taking turns.")] = 1,
    dcgm: Annotated[list[str] | None, typer.Option(help="Metrics page of a DCGM exporter; may be repeated.")] = None,
    seed: Seed = 1,
    json: Json = None,
) -> int:
    """A trace against engines that really compute, through the SDK: one policy after the other, the same report.

    Energy is NVML's or DCGM's, where there is a GPU. Exit code 1 when a conversation had to be given up.
    """
    from conserve_lab.live.replay_command import ReplayRun, run_replay
    from conserve_lab.replay import choose_conversations

    console = _console()
    policies = tuple(dict.fromkeys(policy or Policy))
    if sum(map(bool, (engine, broker, local_vllm))) != 1:
        raise typer.BadParameter("say which engines: --engine ROLE=URL for each, or --broker URL, or --local-vllm VENV")
    if broker and len(policies) > 1:
        raise typer.BadParameter("a running broker has one preset: give one --policy, or --engine instead of --broker")
    with ExitStack() as stack:
        fleet, fresh = _live_fleet(stack, engine or [], broker, local_vllm, console=console, plain=False)
        chosen = choose_conversations(
            trace,
            count=conversations,
            turns_max=turns,
            output_tokens_max=answer_tokens,
            context_tokens_max=fleet.context_tokens_max * _CONTEXT_PERCENT // 100,
            seed=seed,
        )
        run = ReplayRun(
            policies=policies,
            chosen=chosen,
            per_s=per_s,
            repetitions=repetitions,
            preset=preset,
            broker_url=broker,
            seed=seed,
            dcgm_urls=tuple(dcgm or ()),
            fresh=fresh,
        )
        return run_replay(run, fleet, json_path=json, console=console)


def calibrate_live(
    url: str,
    venv: Path | None,
    *,
    conversations: int,
    repetitions: int,
    batched_tokens: int,
    max_seqs: int,
    cells_path: Path | None,
    json_path: Path | None,
) -> int:
    """Run `conserve lab calibrate` at an engine that runs, or one that is started for it."""
    from conserve_lab.live.calibrate_command import LiveCalibration, run_live_calibration
    from conserve_lab.live.cells import Grid
    from conserve_lab.replay import choose_conversations

    console = _console()
    with ExitStack() as stack:
        fleet, _ = _live_fleet(stack, [url] if url else [], "", venv, console=console, plain=True)
        chosen = choose_conversations(
            "coding",
            count=conversations,
            turns_max=5,
            output_tokens_max=60,
            context_tokens_max=fleet.context_tokens_max * _CONTEXT_PERCENT // 100,
            seed=1,
        )
        run = LiveCalibration(
            grid=Grid(repetitions=repetitions).within(fleet.context_tokens_max),
            chosen=chosen,
            max_num_batched_tokens=batched_tokens,
            max_num_seqs=max_seqs,
        )
        return run_live_calibration(run, fleet, cells_path=cells_path, json_path=json_path, console=console)


def _emulator(
    *,
    streams: Annotated[
        list[int] | None, typer.Option(min=1, max=5_000, help="Streams at once; may be repeated. Default: 25 to 400.")
    ] = None,
    engines: Annotated[int, typer.Option(min=1, max=64, help="Emulated engines they are spread over.")] = 4,
    output_tokens: Annotated[int, typer.Option(min=2, max=10_000, help="Tokens of each stream.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1, max=100, help="How often each row.")] = 3,
    json: Json = None,
) -> int:
    """How far the emulator's times are off those of the model it emulates, and up to which load."""
    from conserve_lab.bench.fidelity import FidelityRun, run_fidelity

    counts = tuple(sorted(streams)) if streams else FidelityRun().streams
    run = FidelityRun(streams=counts, engines=engines, output_tokens=output_tokens, repetitions=repetitions)
    return run_fidelity(run, json_path=json, console=_console())


def _hold(
    *,
    json: Json = None,
    vllm_venv: Annotated[Path | None, typer.Option(help="Environment that holds vLLM. Default: .venv-vllm")] = None,
    hold_s: Annotated[int, typer.Option(min=2, max=120, help="How long a turn's KV is held.")] = 20,
    turns: Annotated[int, typer.Option(min=2, max=50, help="Turns of each conversation.")] = 4,
) -> int:
    """What holds are worth on real vLLM, and what they cost: history computed again, and how long newcomers wait.

    Starts one decoder of a tiny model on this machine's CPU. Exit code 1 when there is no vLLM.
    """
    from conserve_lab.vllm.hold_cost import HoldRun, run_holds

    try:
        run = HoldRun(hold_s=hold_s, turns=turns)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem
    return run_holds(run, venv=vllm_venv, json_path=json, console=_console())


def _live_fleet(
    stack: ExitStack, named: list[str], broker: str, venv: Path | None, *, console: Console, plain: bool
) -> tuple[LiveFleet, Callable[[], object]]:
    """Return the engines, and what makes their caches cold again (nothing, where they are not ours).

    `plain`: of vLLM one server without a connector, not a fleet.
    """
    from conserve_lab.live.engines import NoEngines, engines_of_broker, local_vllm, named_engines

    try:
        if venv is None:
            return (engines_of_broker(broker) if broker else named_engines(named)), lambda: None
    except NoEngines as problem:
        raise typer.BadParameter(str(problem)) from problem
    counts = {"prefillers": 0, "decoders": 0, "references": 1} if plain else {"prefillers": 1, "decoders": 2}
    say = partial(console.print, style="dim", markup=False)
    started, fleet = stack.enter_context(local_vllm(venv, say=say, **counts))

    def restart() -> None:
        for engine_id in list(started.engines):
            started.restart(engine_id)

    return fleet, restart


def _console() -> Console:
    """Return the console; a pipe has no width, so it gets one in which tables need not wrap."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


LIVE_COMMANDS: dict[str, Callable[..., int]] = {
    "emulator": _emulator,
    "hold": _hold,
    "peers": _peers,
    "replay": _replay,
}

"""One run of the workload: broker, SDK, agents, and the three accounts of what happened."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.baselines import PerTurnPlanner
from conserve_lab.demo.agent import Agent, AgentFactory, AgentRun, build_agent, run_agents
from conserve_lab.demo.counters import EngineCounters, read_counters, total
from conserve_lab.demo.cpu import LagMeter, cpu_s, thread_ids
from conserve_lab.demo.errors import DemoError
from conserve_lab.demo.figures import Observation, Variant
from conserve_lab.demo.fleets import RunningFleet
from conserve_lab.demo.plain_http import plain_async_client
from conserve_lab.demo.report import COLUMNS
from conserve_lab.demo.scripted import scripted_node
from conserve_lab.demo.settings import DemoSettings
from conserve_lab.demo.tasks import Task
from conserve_lab.demo.tools import Toolbox
from conserve_lab.demo.view import Progress, watching
from conserve_lab.demo.workspace import Workspace
from conserve_langgraph import ConServeChat
from conserve_sdk import ConServe
from conserve_sdk.protocol import FleetInfo
from conserve_sdk.telemetry import TurnCollector, TurnRecord

SETTLE_BUDGET_S = 10.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run to do."""

    variant: Variant
    settings: DemoSettings
    tasks: Sequence[Task]

    @property
    def preset(self) -> str:
        """The broker's preset: a comparison's own, else the one that was asked for."""
        match self.variant:
            case Variant.PER_TURN:
                return "paper"  # every lease gets a prefiller; the planner then uses it in every turn
            case Variant.AFFINITY:
                return "affinity"
            case Variant.CONSERVE:
                return self.settings.preset


def broker_config(fleet: RunningFleet, *, preset: str, port: int = 0, journal: str = "") -> BrokerConfig:
    """Return the configuration of a broker for this fleet.

    Raises:
        ConfigProblem: the fleet's entries do not fit the broker.
    """
    return BrokerConfig.from_mapping(
        {
            "listen": {"port": port},
            "placement": {"preset": preset},
            "scrape": {"interval_ms": 500},
            "journal": {"path": journal},
            "engine": list(fleet.broker_engines),
        }
    )


async def run_trial(trial: Trial, fleet: RunningFleet, *, console: Console) -> Observation:
    """Run the workload once, on a fleet whose caches are cold.

    Raises:
        TimeoutError: the broker never saw all engines ready.
        DemoError: the run exceeded its budget.
    """
    collector = TurnCollector()
    with tempfile.TemporaryDirectory(prefix="conserve-demo-") as name:
        folder = Path(name)
        config = broker_config(fleet, preset=trial.preset, journal=str(folder / "leases.sqlite"))
        other_threads = thread_ids()
        with BrokerServer(config) as broker:
            broker_threads = thread_ids() - other_threads
            await asyncio.to_thread(broker.wait_until_ready, engines=len(fleet.urls))
            await _warm_up(trial, fleet, broker.url, folder / "warm-up")
            account_before, before = await _account(broker.url), await read_counters(fleet.urls)
            cpu_before_s = cpu_s(broker_threads)
            started_s = time.monotonic()
            async with AsyncExitStack() as stack:
                lag = stack.enter_context(LagMeter())
                conserve = await stack.enter_async_context(_sdk(trial, broker.url, collector))
                progress = Progress(
                    COLUMNS[trial.variant], conversations=len(trial.tasks), broker_url=broker.url, turns=collector
                )
                with watching(progress, console=console, plain=trial.settings.plain):
                    runs = await _run(trial, agents_on(fleet, conserve, trial.settings, folder), progress)
                elapsed_s = time.monotonic() - started_s
                await asyncio.to_thread(conserve.flush)
            migrated = len({record.lease_id for record in collector.records if record.migrated})  # counted once a lease
            account = await settled_account(broker.url, migrations=account_before.migrations_total + migrated)
            broker_cpu_s = _since(cpu_s(broker_threads), cpu_before_s)
            counters = await settled_counters(fleet.urls, before, requests=_requests_sent(collector.records))
    return Observation(
        variant=trial.variant,
        engine=fleet.kind,
        preset=trial.preset,
        runs=runs,
        records=collector.records,
        counters=counters,
        prefiller_ids=fleet.prefiller_ids,
        broker_grants=account.grants_total - account_before.grants_total,
        broker_migrations=account.migrations_total - account_before.migrations_total,
        elapsed_s=elapsed_s,
        broker_cpu_s=broker_cpu_s,
        machine_lag_ms=lag.late_ms(95),
    )


async def _warm_up(trial: Trial, fleet: RunningFleet, broker_url: str, folder: Path) -> None:
    """Hold one short conversation that is not counted: what is made at the first use shall not be measured."""
    task = Task(conversation_id="warm-up", arrival_s=0.0, prompt="Read the rules.", seed=0, turns=2)
    async with _sdk(trial, broker_url, TurnCollector()) as conserve:
        await run_agents([task], agent_for=agents_on(fleet, conserve, trial.settings, folder))
        await conserve.arelease(task.conversation_id)
        await asyncio.to_thread(conserve.flush)


def agents_on(fleet: RunningFleet, conserve: ConServe, settings: DemoSettings, folder: Path) -> AgentFactory:
    """Return what builds the agent of a task: one chat model for all, and a workspace for each."""
    model = ConServeChat(model=fleet.model, conserve=conserve, streaming=True)

    def agent_for(task: Task) -> Agent:
        tools = Toolbox(Workspace(folder / task.conversation_id, seed=task.seed)).tools()
        if fleet.call_bias is None:
            return build_agent(model.bind_tools(tools), tools)
        node = scripted_node(
            model,
            tools,
            turns=task.turns,
            call_bias=fleet.call_bias,
            answer_tokens=settings.workload.answer_tokens,
        )
        return build_agent(node, tools)

    return agent_for


async def settled_account(broker_url: str, *, migrations: int) -> FleetInfo:
    """Return the broker's account once it has heard of so many migrations, or as it is after a while."""
    deadline_s = time.monotonic() + SETTLE_BUDGET_S
    while True:
        account = await _account(broker_url)
        if account.migrations_total >= migrations or time.monotonic() > deadline_s:
            return account
        await asyncio.sleep(_POLL_S)


async def settled_counters(
    urls: Mapping[str, str], before: Mapping[str, EngineCounters], *, requests: int
) -> dict[str, EngineCounters]:
    """Return what the engines counted since `before`, once it is so many requests, or as it is after a while.

    An engine counts a request after its last bytes are on their way, so that the client may be ahead of it.
    """
    deadline_s = time.monotonic() + SETTLE_BUDGET_S
    while True:
        after = await read_counters(urls)
        counted = {engine_id: after[engine_id] - before[engine_id] for engine_id in after}
        if total(counted.values()).requests >= requests or time.monotonic() > deadline_s:
            return counted
        await asyncio.sleep(_POLL_S)


def _requests_sent(records: Sequence[TurnRecord]) -> int:
    return len(records) + sum(1 for record in records if record.prefill_engine_id)


async def _account(broker_url: str) -> FleetInfo:
    async with plain_async_client(5) as client:
        answer = await client.get(f"{broker_url}/v1/fleet")
    return FleetInfo.model_validate_json(answer.raise_for_status().content)


def _since(now_s: float | None, before_s: float | None) -> float | None:
    return None if now_s is None or before_s is None else now_s - before_s


async def _run(trial: Trial, agent_for: AgentFactory, progress: Progress) -> list[AgentRun]:
    try:
        async with asyncio.timeout(trial.settings.budget_s):
            return await run_agents(trial.tasks, agent_for=agent_for, on_finish=progress.finish)
    except TimeoutError:
        limit = f"{trial.settings.budget_s:.0f} s"
        raise DemoError(f"{trial.variant}: not done after {limit}; is the machine busy?") from None


def _sdk(trial: Trial, broker_url: str, collector: TurnCollector) -> ConServe:
    if trial.variant is Variant.PER_TURN:
        return ConServe(broker_url, on_turn=collector, planner=PerTurnPlanner())
    return ConServe(broker_url, on_turn=collector)

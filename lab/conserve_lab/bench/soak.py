"""`conserve bench soak`: many agents for minutes, while engines and leading brokers die under them."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from conserve_broker.settings import StoreTable
from conserve_lab.bench.fleet_process import FleetProcess
from conserve_lab.bench.load_client import percentiles
from conserve_lab.bench.processes import answer, cpu_us
from conserve_lab.bench.soaked_agents import Agent, Habits, RightAnswers, Tally
from conserve_lab.demo.errors import DemoError
from conserve_lab.emulator import default_fleet
from conserve_lab.failover import BrokerProcess, running_store, store_binary
from conserve_sdk import ConServe

__all__ = ["Soak", "run_soak"]

_MODEL = "emulated"
_LEASE = {"ttl_ms": 20_000, "grace_ms": 10_000}
_LEAK_WAIT_S = (_LEASE["ttl_ms"] + _LEASE["grace_ms"]) / 1_000 + 5
_START_BUDGET_S = 120.0
_DOWN_S = 5.0
_TICK_S = 0.5
_LINE_EVERY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """How much, how long, and what dies.

    Attributes:
        seconds: until agents begin no more conversations.
        think_s: mean pause of an agent between two turns.
        engine_fault_s: one engine after another is killed every so often, and started again after 5 s.
        leader_kills: spread evenly; a killed broker comes back after 5 s, as a standby.
    """

    seconds: float = 600.0
    agents: int = 500
    think_s: float = 30.0
    engine_fault_s: float = 40.0
    leader_kills: int = 2
    prefillers: int = 2
    decoders: int = 4
    time_scale: float = 1.0


@dataclass(slots=True)
class _Scene:
    """Who takes part."""

    soak: Soak
    fleet: FleetProcess
    brokers: list[BrokerProcess]
    tally: Tally = field(default_factory=Tally)
    timeline: list[dict[str, Any]] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)

    @property
    def at_s(self) -> float:
        return time.monotonic() - self.began_s

    def happened(self, what: str) -> None:
        seen = self.tally
        self.timeline.append(
            {"at_s": round(self.at_s, 1), "what": what, "turns": seen.turns, "errors": seen.errors.total()}
        )

    def leader(self) -> BrokerProcess | None:
        return next((broker for broker in self.brokers if broker.role() == "leader"), None)

    def leases(self) -> int | None:
        """Live leases, as the leader counts them."""
        for broker in self.brokers:
            found = answer(f"{broker.url}/v1/fleet")
            if found is not None:
                return int(found["leases"])
        return None


def run_soak(soak: Soak, *, json_path: Path, console: Console, live: bool) -> int:
    """Run, print the table, write the figures.

    Returns:
        1 when a conversation was lost, an answer wrong, or a lease leaked; else 0.

    Raises:
        DemoError: there is no store to share, or something did not start.
        OSError: the file cannot be written.
    """
    binary = store_binary()
    if binary is None:
        raise DemoError("neither valkey-server nor redis-server is installed: apt-get install redis-server")
    before = os.getloadavg()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = StoreTable(kind="redis", url=stack.enter_context(running_store(binary, folder)), lock_ttl_ms=1_500)
        config = default_fleet(
            prefillers=soak.prefillers, decoders=soak.decoders, time_scale=soak.time_scale,
            kv_cache_tokens=262_144, tool_calls_min=0, tool_calls_max=0, max_num_seqs=256,
        )  # fmt: skip
        fleet = stack.enter_context(FleetProcess(config))
        brokers = [BrokerProcess(folder / f"{name}.toml", fleet, store, more={"lease": _LEASE}) for name in "ab"]
        for broker in brokers:
            stack.callback(broker.end)
            broker.start()
        _wait_for_a_lease(brokers)
        scene = _Scene(soak, fleet, brokers)
        with _View(scene, console, live=live) as view:
            found = asyncio.run(_soaked(scene, view, RightAnswers(config.engine[0])))
    found["load"] = {
        **asdict(soak),
        "lock_ttl_ms": store.lock_ttl_ms,
        "lease": _LEASE,
        "store": Path(binary).name,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_average_before": before,
        "load_average_after": os.getloadavg(),
    }
    console.print(_table(found))
    json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {json_path}")
    return int(bool(found["lost"] or found["wrong"] or found["leaked"]))


def _wait_for_a_lease(brokers: list[BrokerProcess]) -> None:
    """Until engines are ready and whoever leads grants; on a busy machine the lead may have changed already."""
    until_s = time.monotonic() + _START_BUDGET_S
    while time.monotonic() < until_s:
        for broker in brokers:
            grant = broker.ask("ready")
            if grant is not None:
                broker.give_back(grant)
                return
        time.sleep(_TICK_S / 5)
    raise DemoError("no broker grants a lease")


async def _soaked(scene: _Scene, view: _View, right: RightAnswers) -> dict[str, Any]:
    soak, tally = scene.soak, scene.tally
    ends_s = time.monotonic() + soak.seconds
    before_us = cpu_us(scene.fleet.pid)
    async with ConServe([broker.url for broker in scene.brokers], on_broker_unavailable="raise") as conserve:
        client = conserve.async_openai_client()
        agents = [
            Agent(
                number,
                conserve=conserve,
                client=client,
                model=_MODEL,
                right=right,
                habits=Habits(think_s=soak.think_s),
                tally=tally,
                goes_on=lambda: time.monotonic() < ends_s,
            )
            for number in range(soak.agents)
        ]
        disturbing = [
            asyncio.create_task(_engines_die(scene, ends_s)),
            asyncio.create_task(_leaders_die(scene)),
            asyncio.create_task(view.keep()),
        ]
        try:
            await asyncio.gather(*(agent.run() for agent in agents))
        finally:
            for task in disturbing:
                task.cancel()
            outcomes = await asyncio.gather(*disturbing, return_exceptions=True)
        failed = [each for each in outcomes if isinstance(each, Exception)]
        if failed:
            raise failed[0]
        scene.happened("every agent is done")
        seconds = scene.at_s
        left = await asyncio.to_thread(scene.leases)
        leaked, held = await _outlasting(scene.leases), await _outlasting(scene.fleet.held_requests)
        dropped = conserve.reports_dropped
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "conversations": tally.conversations,
        "lost": tally.lost,
        "wrong": tally.wrong,
        "leaked": leaked,
        "errors_seen_by_agents": tally.errors.total(),
        "errors_by_kind": dict(tally.errors),
        "turns": tally.turns,
        "turns_per_s": round(tally.turns / seconds, 1),
        "turn": percentiles(tally.turn_ms),
        "slowest_turn_ms": round(max(tally.turn_ms, default=0.0)),
        "leases_left_at_the_end": left,
        "kv_held_at_the_end": held,
        "reports_dropped": dropped,
        "seconds": round(seconds, 1),
        "cpu_share": {
            "agents": round((usage.ru_utime + usage.ru_stime) / seconds, 3),
            "engines": round((cpu_us(scene.fleet.pid) - before_us) / 1e6 / seconds, 3),
        },
        "timeline": scene.timeline,
        "notes": tally.notes,
    }


async def _outlasting(count: Callable[[], int | None]) -> int:
    """What outlives the last agent by more than its own life: what nobody gave back runs out by itself.

    Args:
        count: leases that live, or requests whose KV engines still hold; None: no broker leads.
    """
    until_s = time.monotonic() + _LEAK_WAIT_S
    left = await asyncio.to_thread(count)
    while left != 0 and time.monotonic() < until_s:
        await asyncio.sleep(_TICK_S)
        left = await asyncio.to_thread(count)
    if left is None:
        raise DemoError("no broker leads at the end")
    return left


# ---- what dies -------------------------------------------------------------------------------------------------


async def _engines_die(scene: _Scene, ends_s: float) -> None:
    names = [entry["id"] for entry in scene.fleet.broker_engines()]
    # Decoders and prefillers in turn; decoders first, because conversations live there.
    order = sorted(names, key=lambda name: (name[1:], name[:1]))
    number = 0
    while True:
        await asyncio.sleep(scene.soak.engine_fault_s)
        if time.monotonic() > ends_s:
            return
        name = order[number % len(order)]
        number += 1
        await asyncio.to_thread(scene.fleet.kill, name)
        scene.happened(f"engine {name} killed")
        await asyncio.sleep(min(_DOWN_S, scene.soak.engine_fault_s / 2))
        await asyncio.to_thread(scene.fleet.restart, name)
        scene.happened(f"engine {name} started")


async def _leaders_die(scene: _Scene) -> None:
    soak = scene.soak
    for number in range(1, soak.leader_kills + 1):
        await asyncio.sleep(max(0.0, soak.seconds * number / (soak.leader_kills + 1) - scene.at_s))
        leader = await asyncio.to_thread(scene.leader)
        while leader is None:
            await asyncio.sleep(_TICK_S)
            leader = await asyncio.to_thread(scene.leader)
        leader.signal(signal.SIGKILL)
        name = "ab"[scene.brokers.index(leader)]
        scene.happened(f"leading broker {name} killed")
        await asyncio.sleep(_DOWN_S)
        await asyncio.to_thread(leader.end)
        await asyncio.to_thread(leader.start)
        scene.happened(f"broker {name} started")


# ---- what is shown ---------------------------------------------------------------------------------------------


class _View:
    """A live table; in a pipe, one line every half minute."""

    def __init__(self, scene: _Scene, console: Console, *, live: bool) -> None:
        self._scene = scene
        self._console = console
        self._live = Live(console=console, refresh_per_second=2, transient=True) if live else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    async def keep(self) -> None:
        while True:
            if self._live is not None:
                self._live.update(self._shown())
                await asyncio.sleep(_TICK_S)
            else:
                await asyncio.sleep(_LINE_EVERY_S)
                self._console.print(self._line())

    def _line(self) -> str:
        scene, seen = self._scene, self._scene.tally
        return (
            f"{scene.at_s:5.0f} s of {scene.soak.seconds:.0f}: {seen.talking} conversations under way, "
            f"{seen.conversations} done, {seen.turns} turns; lost {seen.lost}, wrong {seen.wrong}, "
            f"errors seen {seen.errors.total()}"
        )

    def _shown(self) -> Group:
        happened = Table("s", "what happened", "turns", "errors seen", title_justify="left")
        for each in self._scene.timeline[-12:]:
            happened.add_row(str(each["at_s"]), each["what"], str(each["turns"]), str(each["errors"]))
        return Group(self._line(), happened)


def _table(found: dict[str, Any]) -> Table:
    load = found["load"]
    table = Table(
        title=f"{load['agents']} agents for {found['seconds']:.0f} s; load average "
        f"{load['load_average_before'][0]:.1f} before, {load['load_average_after'][0]:.1f} after",
        title_justify="left",
    )
    for column in ("", "measured", "goal"):
        table.add_column(column, justify="left" if not column else "right")
    for key in ("conversations", "turns", "turns_per_s"):
        table.add_row(key, str(found[key]), "")
    for key in ("lost", "wrong", "leaked"):
        table.add_row(key, str(found[key]), "0")
    for key in ("errors_seen_by_agents", "leases_left_at_the_end", "reports_dropped", "slowest_turn_ms"):
        table.add_row(key, str(found[key]), "")
    for name, value in found["turn"].items():
        table.add_row(f"turn {name}", str(value), "")
    return table

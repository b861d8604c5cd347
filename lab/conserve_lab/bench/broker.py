"""`conserve bench broker`: what a grant, a report and a renewal cost, beside the bare server; recovery; failover."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from conserve_lab.bench.blocks import spread_of
from conserve_lab.bench.load_client import Job, LoadClient, Taken, percentiles
from conserve_lab.bench.page_servers import PageServers
from conserve_lab.bench.processes import (
    answer,
    cpu_us,
    running_bare_server,
    running_broker,
    running_engines,
)
from conserve_lab.bench.recovery import Recovered, recover
from conserve_lab.bench.stored_leases import CAPACITY_TOKENS, leases_on, write_journal
from conserve_lab.demo.errors import DemoError
from conserve_lab.failover import Failover, measure_failover, store_binary
from conserve_lab.ports import free_ports
from conserve_sdk.core import Lease, Ms
from conserve_sdk.tokens import SigningKey, TokenSigner, claims_of

__all__ = ["GOALS", "BrokerBench", "run_broker_bench"]

GOALS: dict[str, float] = {
    "grants_per_s": 3_000,
    "grant_cpu_us": 300,
    "report_cpu_us": 10,
    "renewal_cpu_us": 3,
    "grant_p99_ms_at_half_load": 5,
    "recovery_s_100k": 1.2,
    "bytes_per_lease": 1_000,
    "failover_s_kill9": 1.7,
    "failover_s_planned": 0.15,
    "acked_lost": 0,
    "scrape_cpu_share_64": 0.15,
}
"""At most; `grants_per_s`: at least. For one quiet core."""

Figures = dict[str, Any]

_KEY = {"kid": "bench", "secret": "nothing here is worth a better secret"}
_RENEWALS, _REPORTS = 500, 50
_MILLION = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerBench:
    """How much of everything.

    Attributes:
        slices: of grants and of the bare server each, in turn.
        slice_s: how long one is.
        connections: kept open by the load.
        leases: live ones while all of it is measured; renewed and recovered.
        million: recover and weigh a million leases, too.
        scrape_s: how long 64 engines are watched; 0: not at all.
        failovers: kills and planned ends, each; 0: none.
    """

    slices: int = 8
    slice_s: float = 2.0
    connections: int = 32
    leases: int = 100_000
    million: bool = False
    scrape_s: float = 15.0
    failovers: int = 4
    prefillers: int = 4
    decoders: int = 16


def run_broker_bench(bench: BrokerBench, *, json_path: Path, console: Console) -> int:
    """Measure, print the table, write the figures.

    Returns:
        0; what was measured is no matter of success.

    Raises:
        DemoError: a process did not start, or answered with an error.
        OSError: the file cannot be written.
    """
    before = os.getloadavg()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = _served(bench, folder, progress) | _watched(bench, folder, progress) | _replaced(bench, progress)
    found["goals"] = GOALS
    found["load"] = {
        "connections": bench.connections,
        "leases": bench.leases,
        "engines": bench.prefillers + bench.decoders,
        "slices": f"{bench.slices} x {bench.slice_s} s, broker and bare server in turn",
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_average_before": before,
        "load_average_after": os.getloadavg(),
    }
    console.print(_table(found))
    json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {json_path}")
    return 0


# ---- requests --------------------------------------------------------------------------------------------------


def _served(bench: BrokerBench, folder: Path, progress: Progress) -> Figures:
    (port, bare_port), path = free_ports(2), folder / "leases.db"
    with running_engines(prefillers=bench.prefillers, decoders=bench.decoders) as engines, LoadClient() as client:
        for engine in engines:
            engine["kv_capacity_tokens"] = CAPACITY_TOKENS
        tables = _tables(engines, journal=path)
        with running_broker(folder / "broker.toml", tables, port=port):
            seen = answer(f"http://127.0.0.1:{port}/v1/engines") or {"engines": []}
        incarnations = {each["engine_id"]: each["incarnation"] for each in seen["engines"]}
        found = _recovered(bench, folder, engines, incarnations, progress)
        leases = list(leases_on(engines, incarnations, count=bench.leases))
        with (
            running_broker(folder / "broker.toml", tables, port=port) as pid,
            running_bare_server(bare_port) as bare_pid,
        ):
            run = _Run(bench, client, progress, port=port, pid=pid)
            found |= run.grants(bare_port, bare_pid)
            found |= run.batches(leases)
    return found


class _Run:
    """The requests of one broker process."""

    def __init__(self, bench: BrokerBench, client: LoadClient, progress: Progress, *, port: int, pid: int) -> None:
        self._bench = bench
        self._client = client
        self._progress = progress
        self._port = port
        self._pid = pid

    def grants(self, bare_port: int, bare_pid: int) -> Figures:
        """Grants and the bare server's answers in turn, as fast as they come; then both at half the rate of grants."""
        bench = self._bench
        task = self._progress.add_task("grants beside the bare server", total=4 * bench.slices + 2)
        taken: dict[int, list[tuple[Taken, float]]] = {self._port: [], bare_port: []}
        for port, pid in ((self._port, self._pid), (bare_port, bare_pid)):
            self._timed(self._grant_job(port), pid)  # code and connections that were used before
            self._progress.advance(task)
        for number in range(bench.slices):
            for port, pid in ((self._port, self._pid), (bare_port, bare_pid))[:: 1 if number % 2 else -1]:
                taken[port].append(self._timed(self._grant_job(port), pid))
                self._progress.advance(task)
        granted, bare = taken[self._port], taken[bare_port]
        rates = [len(each.ms) / each.seconds for each, _ in granted]
        bare_rates = [len(each.ms) / each.seconds for each, _ in bare]
        costs = [us / len(each.ms) for each, us in granted]
        bare_costs = [us / len(each.ms) for each, us in bare]
        half: dict[int, list[Taken]] = {self._port: [], bare_port: []}
        for _ in range(bench.slices):
            for port, pid in ((self._port, self._pid), (bare_port, bare_pid)):
                half[port].append(self._timed(self._grant_job(port, per_s=statistics.median(rates) / 2), pid)[0])
                self._progress.advance(task)
        at_half, bare_at_half = (percentiles([ms for each in taken for ms in each.ms]) for taken in half.values())
        return {
            "grants_per_s": round(statistics.median(rates)),
            "grant_cpu_us": round(statistics.median(costs), 1),
            "grants_per_core_s": round(_MILLION / statistics.median(costs)),
            "server_ceiling_per_s": round(statistics.median(bare_rates)),
            "server_ceiling_cpu_us": round(statistics.median(bare_costs), 1),
            "grants_over_ceiling": round(statistics.median(rates) / statistics.median(bare_rates), 3),
            "grant_cpu_over_ceiling": round(statistics.median(costs) / statistics.median(bare_costs), 2),
            "grant_at_full_load": percentiles([ms for each, _ in granted for ms in each.ms]),
            "server_ceiling_at_full_load": percentiles([ms for each, _ in bare for ms in each.ms]),
            "grant_at_half_load": at_half | {"per_s": round(statistics.median(rates) / 2)},
            "grant_p99_ms_at_half_load": at_half["p99_ms"],
            "grant_p99_ms_at_half_load_slices": spread_of(
                [percentiles(each.ms)["p99_ms"] for each in half[self._port]]
            ),
            "server_at_half_load": bare_at_half,
            "server_p99_ms_at_half_load": bare_at_half["p99_ms"],
            "spread": {
                "grants_per_s": spread_of(rates, digits=0),
                "grant_cpu_us": spread_of(costs, digits=1),
                "server_ceiling_per_s": spread_of(bare_rates, digits=0),
                "server_ceiling_cpu_us": spread_of(bare_costs, digits=1),
            },
        }

    def batches(self, leases: Sequence[Lease]) -> Figures:
        """Renewals of all leases in batches of 500, and one report for each of a tenth of them in batches of 50."""
        signer = TokenSigner([SigningKey(kid=_KEY["kid"], secret=_KEY["secret"].encode())])
        tokens = [signer.sign(claims_of(lease, exp_ms=Ms(lease.expires_at_ms + lease.ttl_ms))) for lease in leases]
        renewals = [
            json.dumps({"tokens": tokens[start : start + _RENEWALS]}).encode()
            for start in range(0, len(tokens), _RENEWALS)
        ]
        reported = list(zip(leases, tokens, strict=True))[: max(len(tokens) // 10, _REPORTS)]
        reports = [
            json.dumps({"reports": [_report(lease, token) for lease, token in reported[start : start + _REPORTS]]})
            for start in range(0, len(reported), _REPORTS)
        ]
        task = self._progress.add_task("renewals and reports in batches", total=3)
        found: Figures = {}
        for name, path, bodies, size in (
            ("first_renewal", "/v1/renewals", renewals, _RENEWALS),  # checks every signature
            ("renewal", "/v1/renewals", renewals, _RENEWALS),
            ("report", "/v1/reports", [each.encode() for each in reports], _REPORTS),
        ):
            job = Job(port=self._port, path=path, bodies=bodies, connections=2, seconds=600.0)
            taken, us = self._timed(job, self._pid)
            found[f"{name}_cpu_us"] = round(us / len(bodies) / size, 2)
            found[f"{name}_batch"] = percentiles(taken.ms) | {"size": size}
            self._progress.advance(task)
        return found

    def _grant_job(self, port: int, *, per_s: float = 0.0) -> Job:
        body = {
            "conversation_id": "bench-%d",
            "lineage": "main",
            "model": "emulated",
            "first_turn_input_tokens": 3_000,
            "wait_ms": 0,
        }
        bench = self._bench
        return Job(
            port=port, path="/v1/leases", template=json.dumps(body), connections=bench.connections,
            seconds=bench.slice_s, per_s=per_s,
        )  # fmt: skip

    def _timed(self, job: Job, pid: int) -> tuple[Taken, float]:
        before_us = cpu_us(pid)
        taken = self._client.run(job)
        spent_us = cpu_us(pid) - before_us
        if taken.bad or not taken.ms:
            raise DemoError(f"{job.path} answered {taken.bad or 'nothing'}")
        return taken, spent_us


def _report(lease: Lease, token: str) -> dict[str, Any]:
    return {
        "kind": "turn_finished",
        "token": token,
        "prompt_tokens": lease.ledger_tokens + 200,
        "completion_tokens": 100,
        "prompt_bytes": 4 * lease.ledger_tokens,
        "cached_tokens": lease.ledger_tokens,
        "prefill_ms": 20,
        "prefill_engine_id": lease.decoder.engine_id,
        "migrated": lease.prefiller is not None,
        "idle": True,
    }


def _tables(engines: Sequence[dict[str, Any]], *, journal: Path | None = None) -> dict[str, Any]:
    tables: dict[str, Any] = {
        "scrape": {"interval_ms": 1_000},
        "admission": {"leases_max": 10_000_000, "leases_per_tenant_max": 10_000_000},
        "token.keys": [_KEY],
    }
    if journal is not None:
        tables["journal"] = {"path": str(journal)}
    return tables | {"engine": list(engines)}


# ---- recovery, engines, replicas ------------------------------------------------------------------------------


def _recovered(
    bench: BrokerBench,
    folder: Path,
    engines: Sequence[dict[str, Any]],
    incarnations: dict[str, str],
    progress: Progress,
) -> Figures:
    sizes = [bench.leases, *([_MILLION] if bench.million else [])]
    found: Figures = {}
    for size in sizes:
        task = progress.add_task(f"recovery of {size:,} leases", total=4)
        path = folder / "leases.db" if size == bench.leases else folder / "million.db"
        path.unlink(missing_ok=True)
        write_journal(path, islice(leases_on(engines, incarnations, count=size), size))
        progress.advance(task)
        runs: list[Recovered] = []
        for _ in range(3):
            runs.append(recover(path, engines))
            progress.advance(task)
        name = "" if size == bench.leases else "_1m"
        found[f"recovery{name or '_100k'}"] = {
            "leases": runs[0].leases,
            "cpu_s": spread_of([run.cpu_s for run in runs]),
            "wall_s": spread_of([run.wall_s for run in runs]),
            "file_bytes_per_lease": round(path.stat().st_size / size),
        }
        found[f"recovery_s{name or '_100k'}"] = statistics.median(run.cpu_s for run in runs)
        found[f"bytes_per_lease{name}"] = statistics.median(run.bytes_per_lease for run in runs)
    return found


def _watched(bench: BrokerBench, folder: Path, progress: Progress) -> Figures:
    if not bench.scrape_s:
        return {"scrape_cpu_share_64": None}
    task = progress.add_task("64 engines, each scraped once a second", total=1)
    with PageServers(64) as servers:
        tables = _tables(servers.engines)
        (port,) = free_ports(1)
        with running_broker(folder / "watched.toml", tables, port=port) as pid:
            time.sleep(2.0)  # all have been asked for their models
            before_us, began_s = cpu_us(pid), time.perf_counter()
            time.sleep(bench.scrape_s)
            share = (cpu_us(pid) - before_us) / _MILLION / (time.perf_counter() - began_s)
    progress.advance(task)
    return {"scrape_cpu_share_64": round(share, 4)}


def _replaced(bench: BrokerBench, progress: Progress) -> Figures:
    binary = store_binary()
    if not bench.failovers or binary is None:
        skipped = "not asked for" if binary else "neither valkey-server nor redis-server is installed"
        return {"failover_s_kill9": None, "failover_s_planned": None, "acked_lost": None, "failover": skipped}
    task = progress.add_task("a killed leader, an ended one", total=2 * bench.failovers)
    found: Failover = measure_failover(
        binary, rounds=bench.failovers, lock_ttl_ms=1_500, leases=bench.leases, tick=lambda: progress.advance(task)
    )
    return {
        "failover_s_kill9": round(statistics.median(found.killed_ms) / 1_000, 3),
        "failover_s_planned": round(statistics.median(found.planned_ms) / 1_000, 3),
        "acked_lost": found.acked_lost,
        "failover": {
            "store": Path(binary).name,
            "lock_ttl_ms": 1_500,
            "leases": bench.leases,
            "acked": found.acked,
            "killed_ms": spread_of(found.killed_ms, digits=0),
            "planned_ms": spread_of(found.planned_ms, digits=0),
        },
    }


# ---- the table -------------------------------------------------------------------------------------------------


def _table(found: Figures) -> Table:
    load = found["load"]
    table = Table(
        title=f"{load['leases']:,} live leases, {load['engines']} engines, {load['connections']} connections; load "
        f"average {load['load_average_before'][0]:.1f} before, {load['load_average_after'][0]:.1f} after",
        title_justify="left",
    )
    for column in ("", "measured", "spread", "goal"):
        table.add_column(column, justify="left" if not column else "right")
    beside = ("server_ceiling_per_s", "server_ceiling_cpu_us", "grant_cpu_over_ceiling", "server_p99_ms_at_half_load")
    for key in (*GOALS, *beside):
        goal = "" if key not in GOALS else f"{'>=' if key == 'grants_per_s' else '<='} {GOALS[key]}"
        spread = found["spread"].get(key)
        between = "" if spread is None else f"{spread['p25']} .. {spread['p75']}"
        value = found[key]
        table.add_row(key, "not measured" if value is None else str(value), between, goal)
    return table

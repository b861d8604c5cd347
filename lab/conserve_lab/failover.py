"""How long new conversations wait when the leading broker is killed or ends by plan: processes, real store, wall time.

Two brokers over one Valkey or Redis server, four callers that ask for leases without pause and try the brokers in
order. Measured is the time from the signal to the first lease that the other broker grants.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import httpx2
from rich.console import Console
from rich.table import Table

from conserve_broker.journal import Journal, Recovery
from conserve_broker.redis_store import LeaderRows, RedisStore
from conserve_broker.settings import StoreTable
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_lab.ports import free_ports
from conserve_sdk.core.decisions import LeaseStored
from conserve_sdk.core.lease import Lease, LeaseKey, Mode, binding_of
from conserve_sdk.core.receipt import Receipt
from conserve_sdk.core.units import (
    ConversationId,
    EngineId,
    Incarnation,
    LeaseId,
    LineageId,
    ModelName,
    Ms,
    TenantId,
    Tokens,
)
from conserve_sdk.protocol import LeaseGrant

__all__ = ["BrokerProcess", "Failover", "measure_failover", "run_failover", "running_store", "store_binary"]

_BUDGET_S = 60.0
_GROUP = 2_000
_SERVE = "import sys; from conserve_broker.cli import broker_main; sys.exit(broker_main(sys.argv[1:]))"


def run_failover(*, rounds: int, lock_ttl_ms: int, leases: int, json_path: Path | None, console: Console) -> int:
    """Measure and print; 1 when there is no store to measure on.

    Args:
        rounds: kills and planned ends, each.
        lock_ttl_ms: life of the leader's lock.
        leases: live leases that the other broker takes over.
        json_path: where the figures go; None: nowhere.
        console: where the table goes.
    """
    binary = store_binary()
    if binary is None:
        console.print("error: neither valkey-server nor redis-server is installed; apt-get install redis-server")
        return 1
    found = measure_failover(binary, rounds=rounds, lock_ttl_ms=lock_ttl_ms, leases=leases)
    figures = {"lock_ttl_ms": lock_ttl_ms, "leases": leases, **asdict(found)}
    console.print(_table(figures))
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


@dataclass(slots=True, kw_only=True)
class Failover:
    """What was measured.

    Attributes:
        killed_ms, planned_ms: from the signal to the other broker's first grant, of each run.
        acked: leases that callers were granted before the signals.
        acked_lost: those of them that the new leader did not know.
        load: load average at the start.
    """

    killed_ms: list[float]
    planned_ms: list[float]
    acked: int = 0
    acked_lost: int = 0
    load: float = 0.0


def store_binary() -> str | None:
    """The server that replicas share; None when there is none."""
    return shutil.which("valkey-server") or shutil.which("redis-server")


def measure_failover(
    binary: str, *, rounds: int, lock_ttl_ms: int, leases: int, tick: Callable[[], None] = lambda: None
) -> Failover:
    """Kill the leader and end it by plan, each `rounds` times; `tick` is called after each.

    Raises:
        TimeoutError: a broker did not come up, or nobody took over.
    """
    found = Failover(killed_ms=[], planned_ms=[], load=os.getloadavg()[0])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store_url = stack.enter_context(running_store(binary, folder))
        fleet = stack.enter_context(EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0)))
        store = StoreTable(kind="redis", url=store_url, lock_ttl_ms=lock_ttl_ms)
        brokers = [BrokerProcess(folder / f"{name}.toml", fleet, store) for name in "ab"]
        for broker in brokers:
            stack.callback(broker.end)
        brokers[0].start()
        if leases:
            model = brokers[0].wait_for_lease("pattern")
            brokers[0].end()
            _fill(store, model, leases)
            brokers[0].start()
        brokers[1].start()
        for number, spans in ((signal.SIGKILL, found.killed_ms), (signal.SIGTERM, found.planned_ms)):
            for _ in range(rounds):
                spans.append(_switch(brokers, number, found))
                tick()
    return found


def _table(figures: dict[str, Any]) -> Table:
    table = Table(
        title=f"time to the first grant by the other broker, lock of {figures['lock_ttl_ms']} ms, "
        f"{figures['leases']} live leases (load {figures['load']:.1f})",
        title_justify="left",
    )
    for name in ("the leader", "runs", "min ms", "median ms", "max ms"):
        table.add_column(name, justify="left" if name == "the leader" else "right")
    for key, name in (("killed_ms", "is killed (SIGKILL)"), ("planned_ms", "ends by plan (SIGTERM)")):
        spans = figures[key]
        table.add_row(name, str(len(spans)), f"{min(spans):.0f}", f"{median(spans):.0f}", f"{max(spans):.0f}")
    return table


def _switch(brokers: list[BrokerProcess], number: signal.Signals, found: Failover) -> float:
    """End the leader; how long until the other one grants, in milliseconds. The ended one comes back as a standby.

    Every lease that the old leader had granted until the signal is then asked for by its id, not by its token, which
    would bring a lost one back.
    """
    until = time.monotonic() + _BUDGET_S
    while (leader := next((one for one in brokers if one.role() == "leader"), None)) is None:
        if time.monotonic() > until:
            raise TimeoutError("no broker leads")
        time.sleep(0.02)
    other = brokers[1 - brokers.index(leader)]
    leader.wait_for_lease(f"before-{time.monotonic_ns()}")
    callers = _Callers(leader.url, other.url)
    time.sleep(0.5)  # the callers are warm, and the standby has caught up
    signalled_s = time.monotonic()
    leader.signal(number)
    acked = callers.granted_by_the_first()
    granted_s = callers.first_grant_of_the_second(after_s=signalled_s)
    found.acked += len(acked)
    found.acked_lost += other.unknown(acked)
    leader.end()
    leader.start()
    return (granted_s - signalled_s) * 1000


class _Callers:
    """Four clients that ask without pause, the first broker first."""

    def __init__(self, *urls: str) -> None:
        self._urls = urls
        self._found = threading.Event()
        self._granted_s = 0.0
        self._acked: list[str] = []
        self._threads = [threading.Thread(target=self._call, args=(number,), daemon=True) for number in range(4)]
        for thread in self._threads:
            thread.start()

    def granted_by_the_first(self) -> list[str]:
        """Ids of the leases that the first broker has granted so far."""
        return list(self._acked)

    def first_grant_of_the_second(self, *, after_s: float) -> float:
        """The instant of the first lease that the second broker granted."""
        found = self._found.wait(_BUDGET_S)
        for thread in self._threads:
            thread.join()
        if not found or self._granted_s < after_s:
            raise TimeoutError("the other broker granted nothing")
        return self._granted_s

    def _call(self, caller: int) -> None:
        until = time.monotonic() + _BUDGET_S
        number = 0
        with httpx2.Client(timeout=1.0, trust_env=False) as http:
            while not self._found.is_set() and time.monotonic() < until:
                number += 1
                for url in self._urls:
                    grant = _asked(http, url, f"{os.getpid()}-{id(self)}-{caller}-{number}")
                    if grant is None:
                        continue
                    if url == self._urls[0]:
                        self._acked.append(grant.lease_id)
                    if url == self._urls[1] and not self._found.is_set():
                        self._granted_s = time.monotonic()
                        self._found.set()
                    break
                time.sleep(0.005)


def _asked(http: httpx2.Client, url: str, conversation: str) -> LeaseGrant | None:
    body = {"conversation_id": conversation, "lineage": "main", "model": "emulated", "first_turn_input_tokens": 1}
    try:
        response = http.post(f"{url}/v1/leases", json=body)
    except httpx2.TransportError:
        return None
    return LeaseGrant.model_validate_json(response.content) if response.is_success else None


class EngineEntries(Protocol):
    """Engines that run somewhere."""

    def broker_engines(self) -> list[dict[str, Any]]:
        """Their entries for a broker's configuration."""


class BrokerProcess:
    """`conserve broker` as a process of its own.

    Args:
        path: where its configuration goes.
        fleet: the engines.
        store: shared with the others.
        more: further tables of its configuration.
    """

    def __init__(
        self, path: Path, fleet: EngineEntries, store: StoreTable, *, more: Mapping[str, Any] | None = None
    ) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        tables: dict[str, Any] = {
            "listen": {"port": port},
            "scrape": {"interval_ms": 200},
            "admission": {"leases_max": 1_000_000, "leases_per_tenant_max": 1_000_000},
            "store": {"kind": "redis", "url": store.url, "lock_ttl_ms": store.lock_ttl_ms},
            "token.keys": [{"kid": "bench", "secret": "nothing here is worth a better secret"}],
            **(more or {}),
            "engine": [{"kv_capacity_tokens": 100_000_000, **engine} for engine in fleet.broker_engines()],
        }
        lines: list[str] = []
        for name, table in tables.items():
            for one in table if isinstance(table, list) else [table]:
                lines.append(f"[[{name}]]" if isinstance(table, list) else f"[{name}]")
                lines += [f"{key} = {json.dumps(value)}" for key, value in one.items()]
        path.write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        """Start it, and wait until it leads or could."""
        command = [sys.executable, "-c", _SERVE, "--config", str(self._path), "--log-level", "error"]
        self._process = subprocess.Popen(command)  # noqa: S603  # this interpreter on a file of ours
        until = time.monotonic() + _BUDGET_S
        while not self._could_lead():
            if time.monotonic() > until:
                raise TimeoutError(f"the broker at {self.url} never served")
            time.sleep(0.02)

    def role(self) -> str:
        """`leader` or `standby`; empty while it does not answer."""
        return str(self._readiness().get("role", ""))

    def _could_lead(self) -> bool:
        """It leads, or stands by and knows all leases."""
        found = self._readiness()
        return found.get("role") == "leader" or any("leads" in reason for reason in found.get("reasons", ()))

    def _readiness(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = httpx2.get(f"{self.url}/readyz", timeout=5.0, trust_env=False).json()
        except httpx2.TransportError:
            return {}
        return found

    def wait_for_lease(self, conversation: str) -> LeaseGrant:
        """The first lease that it grants."""
        until = time.monotonic() + _BUDGET_S
        with httpx2.Client(timeout=5.0, trust_env=False) as http:
            while (grant := _asked(http, self.url, conversation)) is None:
                if time.monotonic() > until:
                    raise TimeoutError(f"the broker at {self.url} grants nothing")
                time.sleep(0.02)
        return grant

    def ask(self, conversation: str) -> LeaseGrant | None:
        """Ask for a lease once."""
        with httpx2.Client(timeout=5.0, trust_env=False) as http:
            return _asked(http, self.url, conversation)

    def give_back(self, grant: LeaseGrant) -> None:
        """Release a lease."""
        headers = {"Authorization": f"Lease {grant.token}"}
        httpx2.delete(f"{self.url}/v1/leases/{grant.lease_id}", headers=headers, timeout=5.0, trust_env=False)

    def unknown(self, lease_ids: Sequence[str]) -> int:
        """How many of these leases this broker, leading now, does not know."""
        with httpx2.Client(timeout=5.0, trust_env=False) as http:
            answers = [http.get(f"{self.url}/v1/leases/{lease_id}/explain") for lease_id in lease_ids]
        return sum(answer.status_code == httpx2.codes.NOT_FOUND for answer in answers)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self._process is not None:
            self._process.send_signal(number)

    def end(self) -> None:
        """End it, if it has not ended, and wait for that."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


@contextmanager
def running_store(binary: str, folder: Path) -> Iterator[str]:
    """A server with an append-only file in `folder`; gives its URL."""
    (port,) = free_ports(1)
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    process = subprocess.Popen(  # noqa: S603  # found by name on the PATH, arguments of ours
        [*command, "--appendonly", "yes"], stdout=subprocess.DEVNULL
    )
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()


def _fill(store: StoreTable, pattern: LeaseGrant, leases: int) -> None:
    """Write live leases on the pattern's decoder, as a leader would."""
    connection = RedisStore(store.model_copy(update={"lock_ttl_ms": 60_000}))
    claim = connection.claim(url="", fence_floor=0)
    if not claim.won:
        raise TimeoutError("somebody else leads")
    journal = Journal(LeaderRows(connection, claim, fenced=lambda: None), recovery=Recovery())
    first = _lease_like(pattern)
    for start in range(0, leases, _GROUP):
        journal.submit(
            [
                LeaseStored(
                    lease=replace(
                        first,
                        lease_id=LeaseId(f"filled-{number}"),
                        key=replace(first.key, conversation_id=ConversationId(f"filled-{number}")),
                    )
                )
                for number in range(start, min(start + _GROUP, leases))
            ]
        ).result(_BUDGET_S)
    connection.release(claim)
    journal.close()


def _lease_like(grant: LeaseGrant) -> Lease:
    now_ms = Ms(time.time_ns() // 1_000_000)
    return Lease(
        lease_id=LeaseId("filled"),
        key=LeaseKey(
            tenant=TenantId("default"),
            conversation_id=ConversationId("filled"),
            lineage=LineageId("main"),
            model=ModelName("emulated"),
        ),
        epoch=1,
        mode=Mode.LOCAL,
        prefiller=None,
        decoder=binding_of(
            EngineId(grant.decoder.engine_id), grant.decoder.url, Incarnation(grant.decoder.incarnation)
        ),
        granted_at_ms=now_ms,
        ttl_ms=Ms(3_600_000),
        expires_at_ms=Ms(now_ms + 3_600_000),
        ledger_tokens=Tokens(1),
        hold_ms=Ms(0),
        append_threshold_tokens=Tokens(0),
        supersedes=None,
        receipt=Receipt(preset="", rule="", prefill_rule="", need_tokens=Tokens(1), waited_ms=Ms(0), candidates=()),
        activity_since_ms=now_ms,
    )

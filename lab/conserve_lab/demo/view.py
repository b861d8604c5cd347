"""What the demo shows while it runs: engines with their KV occupancy, leases, migrations, conversations."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from conserve_lab.demo.agent import AgentRun
from conserve_lab.demo.plain_http import plain_client
from conserve_sdk.protocol import EngineInfo, FleetInfo
from conserve_sdk.telemetry import TurnCollector

_BAR_WIDTH = 16
_PLAIN_INTERVAL_S = 2.0
_LIVE_INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One moment of a run.

    Attributes:
        fleet: the broker's account, None until it first answered.
    """

    title: str
    conversations: int
    finished: int
    turns: int
    migrations: int
    fleet: FleetInfo | None


class Progress:
    """Collects what a view shows. The agents' loop writes, the view's thread reads."""

    def __init__(self, title: str, *, conversations: int, broker_url: str, turns: TurnCollector) -> None:
        self.title = title
        self._conversations = conversations
        self._broker_url = broker_url
        self._turns = turns
        self._finished = 0
        self._fleet: FleetInfo | None = None

    def finish(self, run: AgentRun) -> None:
        """Count one finished conversation."""
        del run  # how it went is for the report
        self._finished += 1

    def snapshot(self, client: httpx2.Client) -> Snapshot:
        """Ask the broker and take stock. A broker that does not answer leaves its last account standing."""
        try:
            answer = client.get(f"{self._broker_url}/v1/fleet").raise_for_status()
            self._fleet = FleetInfo.model_validate_json(answer.content)
        except httpx2.HTTPError:
            pass  # shown as it was; the audit after the run is what judges
        records = self._turns.records
        return Snapshot(
            title=self.title,
            conversations=self._conversations,
            finished=self._finished,
            turns=len(records),
            migrations=sum(record.migrated for record in records),
            fleet=self._fleet,
        )


@contextmanager
def watching(progress: Progress, *, console: Console, plain: bool) -> Iterator[None]:
    """Show the progress until the block ends: a live screen, or a line from time to time if `plain`."""
    stop = threading.Event()
    show = _show_lines if plain else _show_live
    thread = threading.Thread(target=show, args=(progress, console, stop), name="conserve-demo-view", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _show_lines(progress: Progress, console: Console, stop: threading.Event) -> None:
    with plain_client(2) as client:
        while not stop.wait(_PLAIN_INTERVAL_S):
            console.print(_line(progress.snapshot(client)), highlight=False)


def _show_live(progress: Progress, console: Console, stop: threading.Event) -> None:
    with (
        plain_client(2) as client,
        Live(console=console, auto_refresh=False, transient=True) as live,
    ):
        while not stop.wait(_LIVE_INTERVAL_S):
            live.update(render(progress.snapshot(client)), refresh=True)


def render(snapshot: Snapshot) -> RenderableType:
    """Draw one moment."""
    fleet = snapshot.fleet
    head = Text.assemble(
        (f"{snapshot.title}  ", "bold"),
        f"leases {fleet.leases if fleet else 0}   waiting {fleet.waiting_requests if fleet else 0}   "
        f"migrations {snapshot.migrations}   turns {snapshot.turns}",
    )
    done = Table.grid(padding=(0, 1))
    done.add_row(
        "conversations",
        ProgressBar(total=snapshot.conversations, completed=snapshot.finished, width=_BAR_WIDTH),
        f"{snapshot.finished}/{snapshot.conversations}",
    )
    return Panel(Group(head, _engines(fleet.engines if fleet else ()), done), title="ConServe", border_style="cyan")


def _engines(engines: Sequence[EngineInfo]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("engine", "role", "state", "KV leased", "", "used", "leases", "run", "wait"):
        table.add_column(column)
    for engine in engines:
        capacity = engine.kv_capacity_tokens or 1
        table.add_row(
            engine.engine_id,
            engine.role,
            Text(engine.state, style="green" if engine.state == "ready" else "yellow"),
            ProgressBar(total=capacity, completed=min(engine.kv_leased_tokens, capacity), width=_BAR_WIDTH),
            f"{engine.kv_leased_tokens:,}",
            f"{engine.kv_used_tokens / capacity:.0%}",
            str(engine.leases),
            str(engine.running),
            str(engine.waiting),
        )
    return table


def _line(snapshot: Snapshot) -> str:
    leases = snapshot.fleet.leases if snapshot.fleet else 0
    return (
        f"{snapshot.title}: {snapshot.finished}/{snapshot.conversations} conversations, {snapshot.turns} turns, "
        f"{leases} leases, {snapshot.migrations} migrations"
    )

"""`conserve top`: what `GET /v1/events` tells, in a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext

import httpx2
from pydantic import ValidationError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from conserve_broker.admin import AdminError, client_for, no_broker, output, refusal, seconds, unreachable
from conserve_broker.snapshot import Snapshot, Totals
from conserve_sdk.protocol import EngineInfo

__all__ = ["top"]

_SILENCE_MAX_S = 40.0  # the broker says something at least every 15 s
_PAUSE_S = 1.0
_RATES_OVER_MS = 60_000
_WAITING_SHOWN = 8
_GREEN, _YELLOW, _RED = "green", "yellow", "red"
_STATES = {
    "ready": _GREEN,
    "draining": _YELLOW,
    "suspect": _YELLOW,
    "unknown": _YELLOW,
    "gone": _RED,
    "misfit": _RED,
}


def top(broker_url: str, *, once: bool, as_json: bool, plain: bool) -> None:
    """Show the broker until interrupted.

    Args:
        broker_url: where the broker answers.
        once: end after the first snapshot.
        as_json: one snapshot a line, as the broker tells it.
        plain: lines instead of a screen that is drawn again and again.

    Raises:
        AdminError: the broker cannot be asked; after the first snapshot only when it says no, else it is waited for.
    """
    console = output()
    drawn = console.is_terminal and not (once or as_json or plain)
    live = Live(console=console, screen=True, auto_refresh=False) if drawn else None
    rates = Rates()
    with live or nullcontext():
        for told in _snapshots(broker_url, patient=not once):
            if isinstance(told, Snapshot):
                rates.add(told)
            if as_json:
                _print_line(told)
            elif live is not None:
                live.update(_screen(told, rates), refresh=True)
            else:
                console.print(_screen(told, rates))
            if once:
                return


def _print_line(told: Snapshot | str) -> None:
    if isinstance(told, Snapshot):
        Console(soft_wrap=True, highlight=False, markup=False).print(told.model_dump_json())


# ---- the stream -------------------------------------------------------------------------------------------------


def _snapshots(broker_url: str, *, patient: bool) -> Iterator[Snapshot | str]:
    """Snapshots as they come; after the first one, also the reason why there is none just now."""
    begun = False
    while True:
        try:
            for snapshot in _connection(broker_url):
                begun = True
                yield snapshot
            lost = "the broker closed the connection"
        except httpx2.HTTPError as fault:
            if not (begun and patient):
                raise unreachable(broker_url, fault) from fault
            lost = f"no answer from {broker_url} ({fault})"
        except httpx2.InvalidURL as fault:
            raise unreachable(broker_url, fault) from fault
        if not begun:
            raise AdminError(f"the broker at {broker_url} told nothing: it is shutting down, or allows no listeners")
        yield f"{lost}; trying again"
        time.sleep(_PAUSE_S)


def _connection(broker_url: str) -> Iterator[Snapshot]:
    with (
        client_for(broker_url, timeout_s=_SILENCE_MAX_S) as client,
        client.stream("GET", f"{broker_url.rstrip('/')}/v1/events") as response,
    ):
        if not response.is_success:
            response.read()
            raise refusal(broker_url, response)
        event = ""
        for line in response.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                event = value
            elif field == "data" and event == "snapshot":
                try:
                    yield Snapshot.model_validate_json(value)
                except ValidationError as fault:
                    raise no_broker(broker_url, response) from fault


class Rates:
    """What happened per minute, from the totals of the last snapshots."""

    def __init__(self) -> None:
        self._seen: deque[Snapshot] = deque()

    def add(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot; totals that fell are another broker's."""
        if self._seen and snapshot.totals.grants < self._seen[-1].totals.grants:
            self._seen.clear()
        self._seen.append(snapshot)
        while snapshot.at_ms - self._seen[0].at_ms > _RATES_OVER_MS:
            self._seen.popleft()

    def per_minute(self, name: str) -> float | None:
        """The rate of one total; None until there are two snapshots."""
        first, last = self._seen[0], self._seen[-1]
        span_ms = last.at_ms - first.at_ms
        if span_ms <= 0:
            return None
        gained: int = getattr(last.totals, name) - getattr(first.totals, name)
        return gained * 60_000 / span_ms


# ---- the screen -------------------------------------------------------------------------------------------------


def _screen(told: Snapshot | str, rates: Rates) -> RenderableType:
    if isinstance(told, str):
        return Text(told, style="red")
    parts: list[RenderableType] = [_head(told)]
    if told.role != "standby":
        parts += [_totals(told.totals, rates), Text(), _fleet(told.engines)]
        parts += [
            Text(f"{engine.engine_id}: {engine.detail}", style="yellow") for engine in told.engines if engine.detail
        ]
        parts += [Text(), _queue(told)]
    return Group(*parts)


def _head(told: Snapshot) -> Text:
    counts = told.leases
    text = Text()
    text.append(f"ConServe {told.version}", style="bold")
    text.append(f"  {told.role}" + (f", preset {told.preset}" if told.preset else ""))
    if told.role != "standby":
        all_leases = counts.busy + counts.idle + counts.parked
        text.append(f"  {all_leases:,} leases: {counts.busy:,} busy, {counts.idle:,} idle, {counts.parked:,} parked")
    for reason in told.reasons:
        text.append(f"\nnot ready: {reason}", style="red")
    for warning in told.warnings:
        text.append(f"\nwarning: {warning}", style="yellow")
    return text


def _totals(totals: Totals, rates: Rates) -> Text:
    shown = []
    for name, total in totals:
        rate = rates.per_minute(name)
        shown.append(f"{name.replace('_', '-')} {total:,}" + ("" if rate is None else f" ({rate:,.0f}/min)"))
    return Text("  ".join(shown))


def _fleet(engines: tuple[EngineInfo, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("engine", "role", "tier", "state", "ledger", "scraped"):
        table.add_column(name, no_wrap=True)
    for name in ("of", "busy/leases", "backlog", "run/wait", "tokens/s", "seen"):
        table.add_column(name, justify="right", no_wrap=True)
    for engine in engines:
        table.add_row(
            engine.engine_id,
            engine.role,
            engine.tier,
            Text(engine.state, style=_STATES[engine.state]),
            _bar(engine.kv_leased_tokens, engine.kv_capacity_tokens),
            _bar(engine.kv_used_tokens, engine.kv_capacity_tokens),
            f"{engine.kv_capacity_tokens:,}",
            f"{engine.busy}/{engine.leases}",
            f"{engine.backlog_tokens:,}",
            f"{engine.running}/{engine.waiting}",
            f"{engine.prefill_rate_tokens_per_s:,}",
            "never" if engine.observed_ago_ms is None else seconds(engine.observed_ago_ms),
        )
    return table


def _bar(part: int, of: int, *, width: int = 10) -> Text:
    if not of:
        return Text("?")
    filled = min(width, round(width * part / of))
    bar = Text("#" * filled + "." * (width - filled), style="cyan")
    return bar.append(f" {100 * part / of:3.0f} %", style="default")


def _queue(told: Snapshot) -> Text:
    if not told.waiting_requests:
        return Text("nobody waits for room")
    lines = [f"{told.waiting_requests:,} wait for room"]
    for place, waiting in enumerate(told.waiting[:_WAITING_SHOWN], start=1):
        lines.append(
            f"{place:>3}. {waiting.conversation_id} needs {waiting.need_tokens:,} tokens of {waiting.model}, waits "
            f"{seconds(waiting.waited_ms)}, gives up in {seconds(waiting.left_ms)}"
        )
    return Text("\n".join(lines))

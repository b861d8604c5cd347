"""What an operator asks a running broker, and how the answers look in a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from conserve_sdk._broker_access import API_KEY_ENV, AccessFaultError, BrokerAccess
from conserve_sdk.protocol import (
    AdviceInfo,
    CandidateInfo,
    EngineInfo,
    EngineList,
    LeaseExplanation,
    ModelAdvice,
    Problem,
)

__all__ = [
    "DEFAULT_URL",
    "AdminError",
    "Command",
    "NoSuchEngineError",
    "advise",
    "ask",
    "client_for",
    "engines_table",
    "explain",
    "list_engines",
    "no_broker",
    "output",
    "print_json",
    "refusal",
    "seconds",
    "set_draining",
    "unreachable",
]

DEFAULT_URL = "http://127.0.0.1:7070"

Command = Callable[[], None]

_TIMEOUT_S = 10.0
_WAIT_POLL_S = 0.5
_WIDE = 200

Answer = TypeVar("Answer", bound=BaseModel)


class AdminError(Exception):
    """The broker cannot be asked or says no; one line that says what to do."""


class NoSuchEngineError(AdminError):
    """The broker knows no such engine (any more)."""


def explain(broker_url: str, lease_id: str, *, as_json: bool) -> None:
    """Print why a lease stands where it does.

    Raises:
        AdminError: unreachable broker, or no such live lease.
    """
    found = ask("GET", broker_url, f"/v1/leases/{quote(lease_id, safe='')}/explain", LeaseExplanation)
    if as_json:
        print_json(found)
        return
    console = output()
    for sentence in found.in_words:
        console.print(f"- {sentence}", soft_wrap=True)
    console.print(_facts(found))
    console.print(_candidates(found))


def list_engines(broker_url: str, *, as_json: bool) -> None:
    """Print the engines.

    Raises:
        AdminError: unreachable broker.
    """
    found = ask("GET", broker_url, "/v1/engines", EngineList)
    if as_json:
        print_json(found)
    else:
        output().print(engines_table(found.engines))


def set_draining(broker_url: str, engine_id: str, *, draining: bool, as_json: bool, wait: bool = False) -> None:
    """Drain or undrain an engine and print it.

    Args:
        broker_url: where the broker answers.
        engine_id: which engine.
        draining: True to drain.
        as_json: print the engine as JSON at the end, and nothing else.
        wait: come back when its last lease has ended, telling meanwhile how many are left.

    Raises:
        AdminError: unreachable broker, or no such engine.
    """
    verb = "drain" if draining else "undrain"
    path = f"/v1/engines/{quote(engine_id, safe='')}"
    found = ask("POST", broker_url, f"{path}/{verb}", EngineInfo)
    told = -1
    while wait and found.leases:
        if not as_json and found.leases != told:
            told = found.leases
            output().print(f"{engine_id}: {told} {'lease' if told == 1 else 'leases'} left")
        time.sleep(_WAIT_POLL_S)
        try:
            found = ask("GET", broker_url, path, EngineInfo)
        except NoSuchEngineError:
            found = found.model_copy(update={"leases": 0, "state": "gone"})
    if as_json:
        print_json(found)
    else:
        output().print(engines_table((found,)))


def advise(broker_url: str, *, as_json: bool) -> None:
    """Print what the fleet's figures call for.

    Raises:
        AdminError: unreachable broker.
    """
    found = ask("GET", broker_url, "/v1/advice", AdviceInfo)
    if as_json:
        print_json(found)
        return
    console = output()
    if not found.models:
        console.print("no engine is configured: add [[engine]] tables")
    for advice in found.models:
        console.print(_advice(advice, found.preset), soft_wrap=True)


def print_json(answer: BaseModel) -> None:
    """The broker's answer as JSON on standard output."""
    Console(soft_wrap=True, highlight=False, markup=False).print(answer.model_dump_json(indent=2))


def output() -> Console:
    """Standard output; where it is no terminal, lines are as long as they need to be."""
    console = Console(markup=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console


def ask(method: str, broker_url: str, path: str, answer: type[Answer]) -> Answer:
    """One question to the broker.

    Raises:
        AdminError: unreachable broker, or it says no.
    """
    try:
        with client_for(broker_url, timeout_s=_TIMEOUT_S) as client:
            response = client.request(method, broker_url.rstrip("/") + path)
    except (httpx2.HTTPError, httpx2.InvalidURL) as fault:
        raise unreachable(broker_url, fault) from fault
    if response.is_success:
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as fault:
            raise no_broker(broker_url, response) from fault
    raise refusal(broker_url, response)


def client_for(broker_url: str, *, timeout_s: float) -> httpx2.Client:
    """An HTTP client as operators use it: with their API key and certificates, without proxies.

    Raises:
        AdminError: the environment names a key or certificates that cannot be used.
    """
    try:
        access = BrokerAccess.resolve()
        transport = httpx2.HTTPTransport(verify=access.verify([broker_url]))
    except AccessFaultError as fault:
        raise AdminError(str(fault)) from fault
    return httpx2.Client(transport=transport, timeout=timeout_s, trust_env=False, headers=access.headers())


def unreachable(broker_url: str, fault: Exception) -> AdminError:
    """Nobody answers."""
    return AdminError(f"no broker answers at {broker_url} ({fault}): start it, or correct --broker")


def no_broker(broker_url: str, response: httpx2.Response) -> AdminError:
    """Somebody else answers."""
    return AdminError(
        f"what answers at {broker_url} is no ConServe broker (status {response.status_code}): correct --broker"
    )


def refusal(broker_url: str, response: httpx2.Response) -> AdminError:
    """The broker says no."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        return no_broker(broker_url, response)
    if problem.status in (401, 403):
        return AdminError(f"{problem.detail} ({problem.code}): set {API_KEY_ENV} to a key that may")
    kind = NoSuchEngineError if problem.code == "engine_unknown" else AdminError
    return kind(f"{problem.detail} ({problem.code})")


# ---- tables -----------------------------------------------------------------------------------------------------


def _facts(lease: LeaseExplanation) -> Table:
    table = Table(title=f"lease {lease.lease_id}", show_header=False, title_justify="left", box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "conversation": f"{lease.conversation_id} / {lease.lineage} ({lease.model})",
        "epoch": f"{lease.epoch}" + (f", supersedes {lease.supersedes}" if lease.supersedes else ""),
        "mode": lease.mode,
        "prefiller": lease.prefiller.engine_id if lease.prefiller else "none",
        "decoder": f"{lease.decoder.engine_id} ({lease.decoder_now.state if lease.decoder_now else 'gone'})",
        "activity": f"{lease.activity} for {seconds(lease.activity_for_ms)}",
        "turns, migrations": f"{lease.turns}, {lease.migrations}",
        "ledger": f"{lease.ledger_tokens:,} tokens",
        "granted": f"{seconds(lease.granted_ago_ms)} ago, expires in {seconds(lease.expires_in_ms)}",
        "decoder chosen by": f"{lease.decision.rule} (preset {lease.decision.preset})",
        "prefill chosen by": lease.decision.prefill_rule,
        "needed": f"{lease.decision.need_tokens:,} tokens, waited {seconds(lease.decision.waited_ms)}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _candidates(lease: LeaseExplanation) -> Table:
    table = Table(title="candidates as they were", title_justify="left", box=None, pad_edge=False)
    for name in ("role", "engine", "verdict"):
        table.add_column(name, no_wrap=True)
    for name in ("active", "leased", "of", "used", "backlog", "running", "tokens/s", "prefilling", "new", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    for candidate in lease.decision.candidates:
        table.add_row(*_candidate_row(candidate), style="bold" if candidate.verdict == "chosen" else None)
    return table


def _candidate_row(candidate: CandidateInfo) -> tuple[str, ...]:
    return (
        candidate.role,
        candidate.engine_id,
        candidate.verdict,
        f"{candidate.active_tokens:,}",
        f"{candidate.leased_tokens:,}",
        f"{candidate.capacity_tokens:,}",
        f"{candidate.used_tokens:,}",
        f"{candidate.backlog_tokens:,}",
        str(candidate.running),
        f"{candidate.rate_tokens_per_s:,}",
        f"{candidate.prefill_share_ppm / 10_000:.0f} %",
        "" if candidate.uncached_tokens < 0 else f"{candidate.uncached_tokens:,}",
        "" if candidate.score_us < 0 else f"{candidate.score_us / 1000:,.1f} ms",
    )


def engines_table(engines: tuple[EngineInfo, ...]) -> Group:
    """A table, and below it why an engine is not ready: such lines are too long for a column."""
    table = Table(box=None, pad_edge=False)
    for name in ("engine", "role", "state", "model"):
        table.add_column(name, no_wrap=True)
    for name in ("leased", "of", "leases", "running", "backlog", "seen"):
        table.add_column(name, justify="right", no_wrap=True)
    for engine in engines:
        table.add_row(
            engine.engine_id,
            engine.role,
            engine.state,
            engine.model,
            f"{engine.kv_leased_tokens:,}",
            f"{engine.kv_capacity_tokens:,}",
            str(engine.leases),
            str(engine.running),
            f"{engine.backlog_tokens:,}",
            "never" if engine.observed_ago_ms is None else seconds(engine.observed_ago_ms),
        )
    details = [Text(f"{engine.engine_id}: {engine.detail}") for engine in engines if engine.detail]
    return Group(table, *details)


def _advice(advice: ModelAdvice, preset: str) -> Group:
    if not advice.prefillers:
        verdict = "do not disaggregate: no prefillers, every engine a decoder"
    else:
        verdict = f"{advice.prefillers} prefillers, {advice.decoders} decoders"
    sure = "" if advice.sure else " (too little was seen to be sure)"
    table = Table(title=f"model {advice.model}", show_header=False, title_justify="left", box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    rows = {
        "advice": f"preset {advice.preset}, {verdict}{sure}",
        "in force": f"preset {preset}, {advice.prefillers_now} prefillers of {advice.engines_ready} ready engines",
        "active KV": f"{advice.kv_active_ppm / 10_000:.0f} % of the decoders",
        "prefill work": f"{advice.prefill_work_ppm / 1_000_000:.2f} engines",
        "first turns": f"{advice.first_turn_p50_tokens:,} uncached tokens in the median of {advice.grants} grants",
        "queue": f"95 % waited at most {seconds(advice.wait_p95_ms)}, {advice.waiting} wait now",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return Group(table, *(Text(f"- {finding.text}") for finding in advice.findings))


def seconds(ms: int) -> str:
    """A time span in seconds."""
    return f"{ms / 1000:.1f} s"

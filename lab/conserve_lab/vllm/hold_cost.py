"""What holds are worth and what they cost, on real vLLM on this machine: `conserve bench hold`.

Two questions. How much history do follow-up turns compute again when others push it out of the cache between the
turns, with and without holds? And how long does a newcomer wait for room when a decoder is full of held KV, with and
without the broker's bound (`lease.hold_share`)? Tokens are vLLM's own counts; prompts are ids drawn with a fixed seed.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.vllm.errors import VllmError
from conserve_lab.vllm.fleet import FleetOptions, VllmFleet
from conserve_sdk import ConServe, conversation
from conserve_sdk.core.units import EngineId, Ms, Tokens

__all__ = ["HoldFigures", "HoldRun", "Pressed", "hold_table", "measure_holds", "run_holds"]

ANSWER_TOKENS = 16
IDS = range(64, 500)
"""Inside the tiny model's vocabulary, clear of its special tokens."""
DECODER = EngineId("d0")
BUDGET_S = 120.0

Json = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class HoldRun:
    """What to measure.

    Attributes:
        cache_tokens: size of the decoder's KV cache.
        hold_s: how long a turn's KV is held.
        conversations, turns: the agents, and how often each asks.
        first_tokens, append_tokens: their first prompts, and what each later one adds to the answer before it.
        strangers, stranger_tokens: requests of others between any two turns, and their size.
        holders, holder_tokens: conversations that fill the decoder, and what each holds.
        newcomer_tokens: the request that then wants room.

    Raises:
        ValueError: the strangers do not fill the cache, the conversations do not fit in it beside one stranger, or the
            newcomer would fit beside all holders, or would not fit beside half a cache of them. Nothing would be
            measured then.
    """

    cache_tokens: int = 12_288
    hold_s: int = 20
    conversations: int = 4
    turns: int = 4
    first_tokens: int = 1_000
    append_tokens: int = 64
    strangers: int = 16
    stranger_tokens: int = 1_000
    holders: int = 8
    holder_tokens: int = 1_088
    newcomer_tokens: int = 3_904

    def __post_init__(self) -> None:
        grown = self.first_tokens + self.turns * (self.append_tokens + ANSWER_TOKENS)
        if self.strangers * self.stranger_tokens < self.cache_tokens:
            raise ValueError(f"the strangers' tokens do not fill a cache of {self.cache_tokens:,}: nothing is evicted")
        if self.conversations * grown + self.stranger_tokens > self.cache_tokens:
            raise ValueError(f"the conversations grow to {self.conversations * grown:,} tokens: too many to be held")
        room = max(self.cache_tokens - self.holders * self.holder_tokens, 0)
        if not room < self.newcomer_tokens <= self.cache_tokens // 2:
            raise ValueError(f"the newcomer has to be above {room:,} and up to {self.cache_tokens // 2:,} tokens")


@dataclass(frozen=True, kw_only=True)
class Pressed:
    """Follow-up turns of conversations that others push out of the cache.

    Attributes:
        history_tokens: what they had said and heard before.
        again_tokens: how much of that was computed again.
        stranger_s: mean time of the others' requests.
    """

    history_tokens: int
    again_tokens: int
    stranger_s: float

    @property
    def again_percent(self) -> float:
        """The share of the history that was computed again."""
        return 100 * self.again_tokens / self.history_tokens


@dataclass(frozen=True, kw_only=True)
class HoldFigures:
    """What was measured.

    Attributes:
        loose, held: the pressure without and with holds.
        newcomer_free_s: a newcomer's time at a decoder whose KV can all be evicted.
        newcomer_full_s: the same at one that is full of held KV.
        newcomer_bounded_s: the same where the broker decided who may hold.
        bounded_held_tokens: what was held then.
        load: load average at the start.
    """

    loose: Pressed
    held: Pressed
    newcomer_free_s: float
    newcomer_full_s: float
    newcomer_bounded_s: float
    bounded_held_tokens: int
    load: float


def run_holds(run: HoldRun, *, venv: Path | None, json_path: Path | None, console: Console) -> int:
    """Measure and print.

    Args:
        run: what.
        venv: the environment that holds vLLM; None: as `find_venv` finds it.
        json_path: where the figures go; None: nowhere.
        console: where the table goes.

    Returns:
        An exit code: 1 when vLLM is not installed or did not run.
    """
    try:
        found = measure_holds(run, venv=venv, say=lambda line: console.print(line, style="dim", markup=False))
    except VllmError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    console.print(hold_table(run, found))
    if json_path is not None:
        json_path.write_text(json.dumps({"run": asdict(run), **asdict(found)}, indent=2) + "\n")
    return 0


def hold_table(run: HoldRun, found: HoldFigures) -> Table:
    """The figures as a table."""
    table = Table("", "without holds", f"held ({run.hold_s} s)", title=f"real vLLM, load {found.load:.1f}")
    table.add_row(
        f"history computed again, of {found.loose.history_tokens:,} tokens",
        f"{found.loose.again_percent:.0f} %",
        f"{found.held.again_percent:.0f} %",
    )
    table.add_row(
        "a stranger's request, mean",
        f"{found.loose.stranger_s * 1000:.0f} ms",
        f"{found.held.stranger_s * 1000:.0f} ms",
    )
    table.add_row(
        f"a newcomer of {run.newcomer_tokens:,} tokens at a full decoder",
        f"{found.newcomer_free_s:.1f} s",
        f"{found.newcomer_full_s:.1f} s",
    )
    bounded = f"the same through the broker ({found.bounded_held_tokens:,} tokens held)"
    table.add_row(bounded, "", f"{found.newcomer_bounded_s:.1f} s")
    return table


def measure_holds(run: HoldRun, *, venv: Path | None, say: Say) -> HoldFigures:
    """Start a decoder and measure.

    Raises:
        VllmError: vLLM is not installed, did not start, or held blocks for longer than it should.
    """
    load = os.getloadavg()[0]
    options = FleetOptions(
        prefillers=0,
        decoders=1,
        max_model_tokens=Tokens(4_096),
        kv_cache_tokens=Tokens(run.cache_tokens),
        hold_ms=Ms(run.hold_s * 1000),
    )
    with (
        VllmFleet(options, venv=venv, say=say) as fleet,
        httpx2.Client(timeout=BUDGET_S, trust_env=False) as http,
    ):
        decoder = _Decoder(fleet, http, run)
        say("follow-ups under pressure, without and with holds")
        loose, held = (_pressed(decoder, run, hold=hold) for hold in (False, True))
        say("a newcomer at a full decoder, without and with holds")
        free_s, full_s = (_full_s(decoder, run, hold=hold) for hold in (False, True))
        say("the same through a broker")
        bounded_s, bounded_tokens = _bounded(decoder, run)
    return HoldFigures(
        loose=loose,
        held=held,
        newcomer_free_s=free_s,
        newcomer_full_s=full_s,
        newcomer_bounded_s=bounded_s,
        bounded_held_tokens=bounded_tokens,
        load=load,
    )


class _Decoder:
    """One decoder, spoken to by hand."""

    def __init__(self, fleet: VllmFleet, http: httpx2.Client, run: HoldRun) -> None:
        self.fleet = fleet
        self._http = http
        self._run = run
        self._draw = random.Random(7)  # noqa: S311  # prompts that nobody has seen, the same in every run

    def ids(self, count: int) -> list[int]:
        return self._draw.choices(IDS, k=count)

    def ask(self, prompt: list[int], *, hold: bool = False, max_tokens: int = 1) -> tuple[list[int], int]:
        """The answer's ids, and how many of the prompt were cached."""
        body: Json = {"model": self.fleet.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        if hold:
            body["kv_transfer_params"] = {"do_remote_decode": True}
        url = f"{self.fleet.engines[DECODER].api}/completions"
        found = self._http.post(url, json=body).raise_for_status().json()
        details = found["usage"]["prompt_tokens_details"] or {}
        return found["choices"][0]["token_ids"], details.get("cached_tokens") or 0

    def newcomer_s(self) -> float:
        started_s = time.monotonic()
        self.ask(self.ids(self._run.newcomer_tokens))
        return time.monotonic() - started_s

    def wait_empty(self) -> None:
        deadline_s = time.monotonic() + BUDGET_S
        while self.fleet.metrics(DECODER).kv_used_tokens:
            if time.monotonic() > deadline_s:
                raise VllmError(f"the decoder still held KV after {BUDGET_S:.0f} s")
            time.sleep(0.2)


def _pressed(decoder: _Decoder, run: HoldRun, *, hold: bool) -> Pressed:
    talks = [decoder.ids(run.first_tokens) for _ in range(run.conversations)]
    had = again = 0
    strangers_s = 0.0
    for turn in range(run.turns):
        for number, prompt in enumerate(talks):
            history = len(prompt) - run.append_tokens if turn else 0
            said, cached = decoder.ask(prompt, hold=hold, max_tokens=ANSWER_TOKENS)
            had, again = had + history, again + max(history - cached, 0)
            talks[number] = prompt + said + decoder.ids(run.append_tokens)
        started_s = time.monotonic()
        for _ in range(run.strangers):
            decoder.ask(decoder.ids(run.stranger_tokens))
        strangers_s += time.monotonic() - started_s
    decoder.wait_empty()
    return Pressed(history_tokens=had, again_tokens=again, stranger_s=strangers_s / (run.turns * run.strangers))


def _full_s(decoder: _Decoder, run: HoldRun, *, hold: bool) -> float:
    """A newcomer's time at a decoder full of others' KV."""
    for _ in range(run.holders):
        decoder.ask(decoder.ids(run.holder_tokens - 1), hold=hold)
    waited_s = decoder.newcomer_s()
    decoder.wait_empty()
    return waited_s


def _bounded(decoder: _Decoder, run: HoldRun) -> tuple[float, int]:
    """A newcomer's time when the same conversations are held by leases, within the broker's bound; and what is held."""
    hold_ms = run.hold_s * 1000
    config = {
        "listen": {"port": 0},
        "placement": {"preset": "affinity"},
        "lease": {"hold_ms": hold_ms},
        "engine": [entry | {"max_hold_ms": hold_ms} for entry in decoder.fleet.broker_engines()],
    }
    with ExitStack() as stack:
        broker = stack.enter_context(BrokerServer(BrokerConfig.from_mapping(config)))
        broker.wait_until_ready(timeout_s=BUDGET_S, engines=1)
        client = stack.enter_context(stack.enter_context(ConServe(broker.url)).openai_client(max_retries=0))
        for number in range(run.holders):
            with conversation(f"holder {number}"):
                client.completions.create(
                    model=decoder.fleet.model, prompt=decoder.ids(run.holder_tokens - 1), max_tokens=1, temperature=0
                )
        held = decoder.fleet.metrics(DECODER).kv_used_tokens
        return decoder.newcomer_s(), held

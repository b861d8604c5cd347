"""One replay through one door: what the client saw, what the engines counted, what it cost."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conserve_lab.demo.counters import EngineCounters, read_counters, total
from conserve_lab.demo.cpu import LagMeter
from conserve_lab.live.doors import OpenDoor
from conserve_lab.live.fleet import LiveFleet
from conserve_lab.replay import ConversationSample, Pace, PromptWriter, Replay, latencies
from conserve_lab.workloads import Conversation, Turn

SETTLE_BUDGET_S = 10.0
IDLE_S = 2.0
_POLL_S = 0.1

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """A decoder is killed once half of all turns are over: the one that has answered the most.

    Attributes:
        kill: kills an engine, by its id.
    """

    kill: Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What is replayed: the conversations, when each begins, and the words."""

    trace: Sequence[Conversation]
    pace: Pace
    writer: PromptWriter


async def run_trial(
    opened: OpenDoor,
    fleet: LiveFleet,
    script: Script,
    *,
    on_turn: Callable[[], object] = lambda: None,
) -> Figures:
    """Replay a trace and return its figures.

    Raises:
        httpx2.HTTPError: an engine does not tell its counters.
    """
    await _warm_up(opened, script.writer)
    before = await read_counters(fleet.urls)
    idle = await _idle_cpu(opened)
    replay = Replay(door=opened.door, pace=script.pace, writer=script.writer, on_turn=lambda _: on_turn())
    others_before, own_before_s = opened.cpu_s(), time.process_time()
    with LagMeter() as lag:
        conversations = await replay.run(script.trace)
        elapsed_s = replay.now_s()
        await opened.settle()
    own_s = time.process_time() - own_before_s
    others = opened.cpu_s()
    found = latencies(conversations)
    counted = await _settled(fleet.urls, before, requests=found["turns"])
    turns = max(found["turns"], 1)
    cpu = {name: (spent_s - others_before[name]) * 1e6 / turns for name, spent_s in others.items()}
    return found | {
        **_engine_figures(counted, fleet),
        "elapsed_s": round(elapsed_s, 2),
        "cpu_us_per_turn": {"driver": round(own_s * 1e6 / turns), **{name: round(us) for name, us in cpu.items()}},
        "idle_cpu_ms_per_s": idle,
        "machine_lag_p95_ms": lag.late_ms(95),
        "load_average": round(os.getloadavg()[0], 2),
    }


async def _warm_up(opened: OpenDoor, writer: PromptWriter) -> None:
    """Hold one short conversation that is not counted: what is made at the first use shall not be measured."""
    turns = (Turn(append_tokens=64, output_tokens=2), Turn(append_tokens=16, output_tokens=2))
    given = Conversation(conversation_id="warm-up", turns=turns)
    await Replay(door=opened.door, pace=Pace(arrivals_us=(0,), give_up_s=0.0), writer=writer).run([given])
    await opened.settle()


async def _idle_cpu(opened: OpenDoor) -> dict[str, float]:
    """What the door's processes cost while nothing travels through it: their looking after the engines."""
    before = opened.cpu_s()
    await asyncio.sleep(IDLE_S)
    return {name: round((spent_s - before[name]) * 1000 / IDLE_S, 1) for name, spent_s in opened.cpu_s().items()}


async def run_blow(
    opened: OpenDoor,
    fleet: LiveFleet,
    script: Script,
    *,
    blow: Blow,
    on_turn: Callable[[], object] = lambda: None,
) -> Figures:
    """Replay a trace, kill a decoder in the middle, and return what failed and for how long."""
    await _warm_up(opened, script.writer)
    before = await read_counters(fleet.urls)
    half = asyncio.Event()
    turns_left = sum(len(given.turns) for given in script.trace) // 2

    def count() -> None:
        nonlocal turns_left
        turns_left -= 1
        if turns_left <= 0:
            half.set()
        on_turn()

    replay = Replay(door=opened.door, pace=script.pace, writer=script.writer, on_turn=lambda _: count())

    async def strike() -> float:
        await half.wait()
        victim = await _busiest(fleet, before)
        struck_s = replay.now_s()
        await asyncio.to_thread(blow.kill, victim)
        return struck_s

    striking = asyncio.create_task(strike())
    conversations = await replay.run(script.trace)
    await opened.settle()
    return _blow_figures(conversations, struck_s=await striking)


def _engine_figures(counted: Mapping[str, EngineCounters], fleet: LiveFleet) -> Figures:
    prefillers = total(counters for name, counters in counted.items() if name in fleet.prefiller_ids)
    everybody = total(counted.values())
    return {
        "prefill_requests": prefillers.requests,
        "transfers": everybody.transfers,
        "transferred_tokens": everybody.received_tokens,
        "computed_prompt_tokens": everybody.computed_tokens,
        "failed_transfers": everybody.failed_transfers,
    }


def _blow_figures(conversations: Sequence[ConversationSample], *, struck_s: float) -> Figures:
    """Count failures, and the time from the kill until the last conversation that failed was answered again."""
    failed = [turn for each in conversations for turn in each.turns if turn.failures]
    answered = [turn.done_s for turn in failed if turn.done_s is not None]
    first_tokens = [turn.first_token_s for turn in failed if turn.first_token_s is not None]
    given_up = sum(each.given_up for each in conversations)
    last_failure_s = max((at_s for turn in failed for at_s, _ in turn.failures), default=struck_s)
    return {
        "failed_turns": len(failed),
        "failed_attempts": sum(len(turn.failures) for turn in failed),
        "conversations_hit": len({turn.conversation_id for turn in failed}),
        "given_up_conversations": given_up,
        "recovery_s": round(max(first_tokens, default=struck_s) - struck_s, 2)
        if len(answered) == len(failed)
        else None,
        "last_failure_s": round(last_failure_s - struck_s, 2),
        "slowest_ttft_ms": _slowest_ttft_ms(conversations, after_s=struck_s),
    }


def _slowest_ttft_ms(conversations: Sequence[ConversationSample], *, after_s: float) -> int:
    """The longest that a turn waited whose first token came after that instant."""
    turns = [turn for each in conversations for turn in each.turns]
    return round(max((turn.ttft_ms or 0.0 for turn in turns if (turn.first_token_s or 0.0) >= after_s), default=0.0))


async def _busiest(fleet: LiveFleet, before: Mapping[str, EngineCounters]) -> str:
    now = await read_counters(fleet.urls)
    decoders = sorted(set(fleet.urls) - fleet.prefiller_ids)
    return max(decoders, key=lambda name: (now[name].generated_tokens - before[name].generated_tokens, name))


async def _settled(
    urls: Mapping[str, str], before: Mapping[str, EngineCounters], *, requests: int
) -> dict[str, EngineCounters]:
    """Return what was counted since `before`, once it stands still at so many requests or more.

    An engine counts a request after its last bytes are on their way.
    """
    deadline_s = time.monotonic() + SETTLE_BUDGET_S
    last = -1
    while True:
        after = await read_counters(urls)
        counted = {name: after[name] - before[name] for name in after}
        seen = total(counted.values()).requests
        if (seen >= requests and seen == last) or time.monotonic() > deadline_s:
            return counted
        last = seen
        await asyncio.sleep(_POLL_S)

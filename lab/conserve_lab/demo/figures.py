"""The figures of one run, each taken from what was observed, and the audit that compares the observers.

Three parties saw the run: the agents (through the SDK's turn records), the broker and the engines. Where they do not
agree the audit says so, and the demo fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from conserve_lab.demo.agent import AgentRun
from conserve_lab.demo.counters import EngineCounters, total
from conserve_sdk.telemetry import TurnRecord, percentile


class Variant(StrEnum):
    """One of the ways to run the workload that the demo puts beside each other."""

    CONSERVE = "conserve"
    PER_TURN = "per_turn"
    AFFINITY = "affinity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Everything seen of one run.

    Attributes:
        counters: what each engine counted during the run, by engine id.
        prefiller_ids: engines that only prefill.
        broker_grants: leases that the broker granted during the run.
        broker_migrations: migrations that the broker was told of, once the last report was flushed.
        elapsed_s: duration of the run.
        broker_cpu_s: CPU seconds of the broker's threads, where they could be told.
        machine_lag_ms: how late a sleeping thread was woken, 95th percentile.
    """

    variant: Variant
    engine: str
    preset: str
    runs: Sequence[AgentRun]
    records: Sequence[TurnRecord]
    counters: Mapping[str, EngineCounters]
    prefiller_ids: frozenset[str]
    broker_grants: int
    broker_migrations: int
    elapsed_s: float
    broker_cpu_s: float | None = None
    machine_lag_ms: float | None = None

    @property
    def prefillers(self) -> EngineCounters:
        """The prefillers' counters, added."""
        return total(counters for name, counters in self.counters.items() if name in self.prefiller_ids)

    @property
    def decoders(self) -> EngineCounters:
        """The other engines' counters, added."""
        return total(counters for name, counters in self.counters.items() if name not in self.prefiller_ids)


def figures(seen: Observation) -> dict[str, Any]:
    """Return the figures under the keys of `conserve demo --json`."""
    follow_ups = [record for record in seen.records if not record.first_turn]
    migrated = {record.lease_id for record in seen.records if record.migrated and record.lease_id}
    moved = total(seen.counters.values()).transfers
    prompt_tokens = sum(record.prompt_tokens for record in follow_ups)
    problems = audit(seen)
    return {
        "engine": seen.engine,
        "preset": seen.preset,
        "conversations": len(seen.runs),
        "tool_calls": sum(run.tool_calls for run in seen.runs),
        "tool_errors": sum(run.tool_errors for run in seen.runs),
        "turns": len(seen.records),
        "leases": seen.broker_grants,
        "leases_migrated": len(migrated),
        "migrations": moved,
        "migrations_per_migrated_lease": round(moved / len(migrated), 4) if migrated else None,
        "re_leases": re_leases(seen),
        "follow_up_turns": len(follow_ups),
        "follow_up_turns_on_prefiller": follow_ups_on_prefiller(seen),
        "follow_up_cached_token_share": _share(sum(record.cached_tokens for record in follow_ups), prompt_tokens),
        "ttft_ms": _percentiles((r.ttft_ms for r in seen.records if r.ttft_ms is not None), (50, 95)),
        "ttfet_ms": _percentiles((r.ttfet_ms for r in seen.records if r.ttfet_ms is not None), (50, 95)),
        "tbt_ms": _percentiles((gap / 1000 for r in seen.records for gap in r.tbt_us), (50, 95, 99)),
        "errors": len(problems),
        "error_details": problems,
        "moved_tokens": total(seen.counters.values()).received_tokens,
        "losses": dict(sorted(Counter(record.loss for record in seen.records if record.loss).items())),
        "elapsed_s": round(seen.elapsed_s, 2),
        "broker_cpu_ms_per_conversation": _cpu_ms(seen),
        "machine_lag_ms": seen.machine_lag_ms,
    }


def follow_ups_on_prefiller(seen: Observation) -> int:
    """Count follow-up turns that touched a prefiller, as the prefillers' own request counters show it.

    A prefiller sees one request per lease that was opened by a prefill there; whatever it finished beyond that came
    from follow-ups.
    """
    opened = _openings(seen.records)
    return max(0, seen.prefillers.requests - sum(record.prefill_engine_id in seen.prefiller_ids for record in opened))


def re_leases(seen: Observation) -> int:
    """Count turns that moved their conversation to another decoder, by a lease of its own (placement: appends)."""
    return sum(not record.first_turn for record in _openings(seen.records))


def _openings(records: Iterable[TurnRecord]) -> list[TurnRecord]:
    """Return the turns that opened their lease with a prefill: a conversation's first, or the one that moved it."""
    found: list[TurnRecord] = []
    seen: set[str | None] = set()
    for record in records:
        if record.prefill_engine_id and (record.first_turn or (record.migrated and record.lease_id not in seen)):
            found.append(record)
        seen.add(record.lease_id)
    return found


def audit(seen: Observation) -> list[str]:
    """Compare the three accounts of the run; return what is wrong, one line each."""
    problems = [run.error for run in seen.runs if run.error]
    problems += [f"turn {r.turn} of {r.conversation_id}: {r.error}" for r in seen.records if r.error]
    problems += [f"turn {r.turn} of {r.conversation_id}: lost to {r.loss}" for r in seen.records if r.loss]
    if problems:  # the counts below cannot agree after a failure; the failure is the finding
        return problems
    records, decoders = seen.records, seen.decoders
    migrated = sum(record.migrated for record in records)
    prefills = [record for record in records if record.prefill_engine_id]
    moved_by_decoder = [record for record in prefills if record.prefill_engine_id not in seen.prefiller_ids]
    on_prefillers, on_decoders = len(prefills) - len(moved_by_decoder), len(records) + len(moved_by_decoder)
    problems += _differ("turns: agents saw {}, the SDK {}", sum(run.turns for run in seen.runs), len(records))
    problems += _differ("requests: the SDK sent {}, the decoders saw {}", on_decoders, decoders.requests)
    problems += _differ("prefills: the SDK sent {}, the prefillers saw {}", on_prefillers, seen.prefillers.requests)
    problems += _differ("migrations: the SDK saw {}, the engines {}", migrated, total(seen.counters.values()).transfers)
    prompt_tokens = sum(record.prompt_tokens for record in [*records, *moved_by_decoder])
    problems += _differ("prompt tokens: usage says {}, the decoders {}", prompt_tokens, decoders.prompt_tokens)
    problems += _differ("failed transfers: expected {}, the engines saw {}", 0, decoders.failed_transfers)
    if seen.engine == "vllm":
        planned = sum(run.task.turns for run in seen.runs)
        problems += _differ("turns: {} were to be, the agents took {}; a call was no valid call", planned, len(records))
    if seen.variant is Variant.CONSERVE:
        problems += _differ("leases opened by a prefill: {} of {} prefills", len(_openings(records)), len(prefills))
        problems += _differ("migrations: the SDK saw {}, the broker {}", migrated, seen.broker_migrations)
        problems += _moved_more_than_once(records)
    return problems


def _moved_more_than_once(records: Iterable[TurnRecord]) -> list[str]:
    moves = Counter(record.lease_id for record in records if record.migrated)
    return [f"lease {lease_id} moved {count} times" for lease_id, count in moves.items() if count > 1]


def _differ(text: str, one: int, other: int) -> list[str]:
    return [] if one == other else [text.format(one, other)]


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _percentiles(values: Iterable[float], ranks: Sequence[int]) -> dict[str, float | None]:
    sample = list(values)
    found = {f"p{rank}": percentile(sample, rank) for rank in ranks}
    return {name: None if value is None else round(value, 1) for name, value in found.items()}


def _cpu_ms(seen: Observation) -> float | None:
    if seen.broker_cpu_s is None or not seen.runs:
        return None
    return round(1000 * seen.broker_cpu_s / len(seen.runs), 2)

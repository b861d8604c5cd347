"""The receipt of a placement decision: candidates, the numbers that were read, the rule that fired.

Every grant and every refusal carries one; `conserve explain LEASE` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from conserve_sdk.core.units import EngineId, Tokens


class CandidateView(NamedTuple):
    """One engine as placement saw it. A tuple: a busy broker keeps hundreds of thousands of them.

    Attributes:
        role: the part it was weighed for: ``"decoder"`` or ``"prefiller"``.
        verdict: ``"chosen"``, ``"fits"`` or the reason it was left out (``"draining"``, ``"over_watermark"``, ...).
        capacity_tokens: KV capacity; 0 when not yet observed.
        leased_tokens: sum of live leases' ledgers on it.
        used_tokens: KV occupancy last scraped from the engine.
        backlog_tokens: uncached prompt tokens dispatched to it whose first token was not yet seen.
        running: streams decoding on it.
        rate_tokens_per_s: observed prefill rate.
        active_tokens: the part of `leased_tokens` whose leases are in a turn or were until a moment ago.
        prefill_share_ppm: share of its time with prefill work, averaged over 20 s; a prefiller starts at "all of it".
        uncached_tokens: prompt tokens it would have to prefill, -1 where no score was computed.
        score_us: the prefill score in microseconds (policy section 7), -1 where the rule did not compute one.
    """

    engine_id: EngineId
    role: str
    verdict: str
    capacity_tokens: Tokens
    leased_tokens: Tokens
    used_tokens: Tokens
    backlog_tokens: Tokens
    running: int
    rate_tokens_per_s: int
    score_us: int = -1
    active_tokens: Tokens = Tokens(0)
    prefill_share_ppm: int = 0
    uncached_tokens: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Why this decision.

    Attributes:
        preset: name of the placement preset in force.
        rule: the rule that fired for the decoder: ``"most_free_kv"``, ``"hint"``, ``"parent"``, ``"append"`` (it
            stays), ``"re_lease_draining"``, ``"re_lease_load"``, or the refusal's reason.
        prefill_rule: the rule that fired for the prefill engine: ``"score"``, ``"always_prefiller"``,
            ``"below_minimum"``, ``"never"``, ``"hosted_on_prefiller"``, ``"old_decoder"`` (a re-lease moves the KV from
            there), ``"cannot_move"``, ``"no_prefiller"``, the verdict all prefillers share
            (``"no_common_transfer_group"``, ``"suspect"``, ``"extra_work"``: it would compute too much again, ...) or
            ``"no_usable_prefiller"``; empty in a refusal.
        need_tokens: tokens that were to be admitted.
        waited_ms: time spent in the queue.
        candidates: engines that were weighed, ordered by role and id; the best ones where there were more than
            `BrokerSettings.receipt_candidates_max` per role.
    """

    preset: str
    rule: str
    prefill_rule: str
    need_tokens: Tokens
    waited_ms: int
    candidates: tuple[CandidateView, ...]

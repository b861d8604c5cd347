"""Making receipts: which engines they show, and the numbers that were read of them."""

from __future__ import annotations

from collections.abc import Sequence

from conserve_sdk.core.hosting import Host
from conserve_sdk.core.prefill import PrefillPlan
from conserve_sdk.core.receipt import Receipt
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import Tokens


def receipt_of(
    settings: BrokerSettings,
    *,
    rule: str,
    need_tokens: Tokens,
    waited_ms: int,
    hosts: Sequence[Host],
    plan: PrefillPlan | None,
) -> Receipt:
    """The receipt of a decision; `plan` None for a refusal."""
    entries_max = settings.receipt_candidates_max
    candidates = []
    for host in _shortlist(hosts, entries_max):
        if plan is not None and host.verdict == "chosen":
            score_us, uncached = plan.decoder_score_us, plan.decoder_uncached_tokens
            candidates.append(host.view.as_candidate("decoder", host.verdict, score_us, uncached))
        else:
            candidates.append(host.view.as_candidate("decoder", host.verdict))
    if plan is not None:
        candidates += [
            weighed.view.as_candidate("prefiller", weighed.verdict, weighed.score_us, weighed.uncached_tokens)
            for weighed in plan.shortlist(entries_max)
        ]
    return Receipt(
        preset=settings.placement.name,
        rule=rule,
        prefill_rule="" if plan is None else plan.rule,
        need_tokens=need_tokens,
        waited_ms=waited_ms,
        candidates=tuple(candidates),
    )


def _shortlist(hosts: Sequence[Host], entries_max: int) -> Sequence[Host]:
    """The hosts a receipt shows: the chosen one and the emptiest others, ordered by id; no busy prefiller."""
    hosts = [host for host in hosts if not host.gated]
    if len(hosts) <= entries_max:
        return hosts

    ranks = {"chosen": 0, "fits": 1}
    ranked = sorted([(ranks.get(host.verdict, 2), host.used_ppm, host.view.spec.engine_id, host) for host in hosts])
    return sorted([host for *_, host in ranked[:entries_max]], key=lambda host: host.view.spec.engine_id)

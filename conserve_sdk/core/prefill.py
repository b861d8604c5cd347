"""Where the first turn is prefilled: on the chosen decoder, or on a prefiller from which its KV then moves once.

The score of an engine, in microseconds, for ``u`` uncached tokens (policy study section 7, turn 1)::

    score(p) = (backlog(p) + u) / rate(p)                  its queue, then our own prefill
             + (0 if p is the decoder else move time)      fixed cost + u tokens over the link
             + W * streams(p) * u / rate(p)                harm to the streams that decode there meanwhile

Streams of an engine are the larger of the busy leases on it (always fresh, but blind to other clients) and of the
requests its scheduler was last seen running (complete, but up to a scrape old). On a pure prefiller nobody decodes:
what runs there is prefill, and the backlog already counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conserve_sdk.core.events import EngineState, Role
from conserve_sdk.core.settings import BrokerSettings, PlacementSettings, PrefillChoice
from conserve_sdk.core.units import MILLION, EngineId, Ms
from conserve_sdk.core.views import EngineView


@dataclass(slots=True, kw_only=True)
class Weighed:
    """A prefiller, what was found about it, and its score (-1 where none was computed)."""

    view: EngineView
    verdict: str
    score_us: int = -1


@dataclass(slots=True, kw_only=True)
class PrefillPlan:
    """The outcome. `prefiller` None: the decoder prefills the first turn itself."""

    prefiller: EngineView | None
    rule: str
    decoder_score_us: int = -1
    """The decoder's own score; -1 where none was computed."""
    weighed: Sequence[Weighed] = ()

    def shortlist(self, entries_max: int) -> Sequence[Weighed]:
        """The prefillers a receipt shows: the chosen one and the best others, ordered by id."""
        if len(self.weighed) <= entries_max:
            return self.weighed

        def rank(weighed: Weighed) -> tuple[int, int, EngineId]:
            order = 0 if weighed.verdict == "chosen" else 1 if weighed.verdict == "fits" else 2
            return order, weighed.score_us, weighed.view.engine_id

        return sorted(sorted(self.weighed, key=rank)[:entries_max], key=lambda weighed: weighed.view.engine_id)


def plan_prefill(
    decoder: EngineView,
    engines: Sequence[EngineView],
    *,
    input_tokens: int,
    failed_engine_id: EngineId | None,
    settings: BrokerSettings,
    now_ms: Ms,
) -> PrefillPlan:
    """Decide where `input_tokens` are prefilled for a lease on `decoder`.

    Args:
        decoder: where the lease will live.
        engines: the engines configured for the model, ordered by id.
        input_tokens: the first turn's input.
        failed_engine_id: engine to leave out.
        settings: preset and freshness bound.
        now_ms: to judge the age of observations.
    """
    rules = settings.placement
    if rules.prefill_choice is PrefillChoice.NEVER:
        return PrefillPlan(prefiller=None, rule="never")
    weighed = [
        Weighed(view=view, verdict=_verdict(view, decoder, input_tokens, settings, now_ms))
        for view in engines
        if view.spec.role is not Role.DECODER and view is not decoder
    ]
    for candidate in weighed:
        if candidate.view.spec.engine_id == failed_engine_id:
            candidate.verdict = "failed"
    plan = PrefillPlan(prefiller=None, rule="", weighed=weighed)
    usable = [candidate for candidate in weighed if candidate.verdict == "fits"]
    if not usable:
        plan.rule = _why_none(weighed)
    elif rules.prefill_choice is PrefillChoice.ALWAYS_PREFILLER:
        least = min(usable, key=lambda candidate: (candidate.view.backlog_tokens, candidate.view.spec.engine_id))
        _choose(plan, least, rule="always_prefiller")
    elif input_tokens < rules.local_below_tokens:
        plan.rule = "below_minimum"
    else:
        _choose_lowest_score(plan, decoder, usable, input_tokens, rules)
    return plan


def score_us(view: EngineView, *, input_tokens: int, moves: bool, rules: PlacementSettings) -> int:
    """The engine's score in whole microseconds; `moves` adds the KV transfer."""
    rate = view.rate_tokens_per_s
    own_us = (view.backlog_tokens + input_tokens) * MILLION // rate
    move_us = rules.transfer_overhead_us + input_tokens * MILLION // rules.transfer_tokens_per_s if moves else 0
    streams = 0 if view.spec.role is Role.PREFILLER else max(view.busy, view.running)
    return own_us + move_us + rules.harm_weight_ppm * streams * input_tokens // rate


def _verdict(view: EngineView, decoder: EngineView, input_tokens: int, settings: BrokerSettings, now_ms: Ms) -> str:
    if view.state is not EngineState.READY:
        return view.state.value
    if not view.observed_within(settings.observation_max_age_ms, now_ms=now_ms):
        return "stale"
    group = view.spec.transfer_group
    if not group or group != decoder.spec.transfer_group:
        return "no_common_transfer_group"
    if view.block_size_tokens != decoder.block_size_tokens:
        return "block_size_differs"
    longest = [bound for bound in (view.kv_capacity_tokens, view.max_model_len_tokens) if bound]
    return "prompt_too_long" if longest and input_tokens > min(longest) else "fits"


def _why_none(weighed: Sequence[Weighed]) -> str:
    verdicts = [candidate.verdict for candidate in weighed]
    if not verdicts:
        return "no_prefiller"
    return verdicts[0] if verdicts.count(verdicts[0]) == len(verdicts) else "no_usable_prefiller"


def _choose(plan: PrefillPlan, chosen: Weighed, *, rule: str) -> None:
    chosen.verdict = "chosen"
    plan.prefiller = chosen.view
    plan.rule = rule


def _choose_lowest_score(
    plan: PrefillPlan, decoder: EngineView, usable: Sequence[Weighed], input_tokens: int, rules: PlacementSettings
) -> None:
    """The lowest score wins; ties stay on the decoder, then go to the lower id."""
    plan.rule = "score"
    plan.decoder_score_us = score_us(decoder, input_tokens=input_tokens, moves=False, rules=rules)
    for candidate in usable:
        candidate.score_us = score_us(candidate.view, input_tokens=input_tokens, moves=True, rules=rules)
    best = min(usable, key=lambda candidate: (candidate.score_us, candidate.view.spec.engine_id))
    if best.score_us < plan.decoder_score_us:
        _choose(plan, best, rule="score")

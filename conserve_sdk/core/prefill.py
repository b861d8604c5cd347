"""Where a prompt is prefilled: on the chosen decoder, or on a prefiller from which its KV then moves once.

The score of an engine, in microseconds, for a first turn as for a later append; ``u(p)`` are the prompt's tokens that
``p`` does not hold (it holds a shared preamble, and a decoder the history of its own leases)::

    score(p) = (backlog(p) + u(p)) / rate(p)               its queue, then our own prefill
             + (0 if p is the decoder else move time)      fixed cost + u(decoder) tokens over the link
             + W * streams(p) * u(p) / rate(p)             harm to the streams that decode there meanwhile

Streams of an engine are the larger of the busy leases on it (always fresh, but blind to other clients) and of the
requests its scheduler was last seen running (complete, but up to a scrape old). On a pure prefiller nobody decodes:
what runs there is prefill, and the backlog already counts it.

A score is one turn's; what a prefiller computes again is everybody's loss. So it takes no prompt of which it would have
to compute more than 1 + EXTRA times what the decoder would (an append brings its history with it), and none with fewer
than MIN new tokens: those are a few steps of an engine, and hold up nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conserve_sdk.core.settings import BrokerSettings, PlacementSettings, PrefillChoice
from conserve_sdk.core.units import MILLION, EngineId, Ms, Tokens
from conserve_sdk.core.views import EngineView
from conserve_sdk.core.vocabulary import EngineState, Role


@dataclass(slots=True, kw_only=True)
class Weighed:
    """A prefiller, what was found about it, and its score (-1 where none was computed)."""

    view: EngineView
    verdict: str
    score_us: int = -1
    uncached_tokens: int = -1


@dataclass(slots=True, kw_only=True)
class PrefillPlan:
    """The outcome. `prefiller` None: the decoder prefills the first turn itself."""

    prefiller: EngineView | None
    rule: str
    decoder_score_us: int = -1
    """The decoder's own score; -1 where none was computed."""
    decoder_uncached_tokens: int = -1
    uncached_tokens: Tokens = Tokens(0)
    """What is to be prefilled where it will be prefilled."""
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
    cached: Mapping[EngineId, Tokens],
    failed_engine_id: EngineId | None,
    settings: BrokerSettings,
    now_ms: Ms,
) -> PrefillPlan:
    """Decide where a prompt of `input_tokens` is prefilled for a lease on `decoder`.

    Args:
        decoder: where the lease will live.
        engines: the engines configured for the model, ordered by id.
        input_tokens: the whole prompt.
        cached: tokens of it that engines are known to hold; none where they are not listed.
        failed_engine_id: engine to leave out.
        settings: preset and freshness bound.
        now_ms: to judge the age of observations.
    """
    rules = settings.placement
    own = _uncached(decoder, input_tokens, cached)
    if rules.prefill_choice is PrefillChoice.NEVER:
        return PrefillPlan(prefiller=None, rule="never", uncached_tokens=own)
    if decoder.spec.role is Role.PREFILLER:
        return PrefillPlan(prefiller=None, rule="hosted_on_prefiller", uncached_tokens=own)
    weighed = [
        Weighed(view=view, verdict=_verdict(view, decoder, input_tokens, settings, now_ms))
        for view in engines
        if view.spec.role is not Role.DECODER and view is not decoder
    ]
    for candidate in weighed:
        if candidate.view.spec.engine_id == failed_engine_id:
            candidate.verdict = "failed"
    plan = PrefillPlan(prefiller=None, rule="", uncached_tokens=own, weighed=weighed)
    usable = [candidate for candidate in weighed if candidate.verdict == "fits"]
    if not usable:
        plan.rule = _why_none(weighed)
    elif rules.prefill_choice is PrefillChoice.ALWAYS_PREFILLER:
        least = min(usable, key=lambda candidate: (candidate.view.backlog_tokens, candidate.view.spec.engine_id))
        _choose(plan, least, rule="always_prefiller", uncached_tokens=_uncached(least.view, input_tokens, cached))
    elif own < rules.local_below_tokens:
        plan.rule = "below_minimum"
    else:
        for candidate in usable:
            candidate.uncached_tokens = _uncached(candidate.view, input_tokens, cached)
        _choose_lowest_score(plan, decoder, usable, rules)
    return plan


def score_us(view: EngineView, *, uncached_tokens: int, moved_tokens: int | None, rules: PlacementSettings) -> int:
    """The engine's score in whole microseconds; `moved_tokens` None where nothing has to move."""
    rate = view.rate_tokens_per_s
    own_us = (view.backlog_tokens + uncached_tokens) * MILLION // rate
    move_us = 0 if moved_tokens is None else _move_us(moved_tokens, rules)
    streams = 0 if view.spec.role is Role.PREFILLER else max(view.busy, view.running)
    return own_us + move_us + rules.harm_weight_ppm * streams * uncached_tokens // rate


def append_threshold_tokens(
    decoder: EngineView,
    engines: Sequence[EngineView],
    *,
    context_tokens: int,
    cached: Mapping[EngineId, Tokens],
    settings: BrokerSettings,
    now_ms: Ms,
) -> Tokens:
    """The append from which on a prefiller could beat the decoder at all; 0 when none could.

    Taken at its most favourable: an idle prefiller, a decoder with the queue it has now and all its leases (this one
    too) decoding at once, and the context as short as it is now. What is below need not be asked about.
    """
    rules = settings.placement
    if not rules.move_appends or rules.prefill_choice is not PrefillChoice.SCORE or decoder.spec.role is Role.PREFILLER:
        return Tokens(0)
    points = []
    for view in engines:
        if view.spec.role is Role.DECODER or view is decoder:
            continue
        if _verdict(view, decoder, context_tokens, settings, now_ms) == "fits":
            there = max(context_tokens - cached.get(view.engine_id, 0), 0)
            point = _break_even_tokens(decoder, view, there, rules)
            frugal = _frugal_tokens(there, rules)
            if point is not None and frugal is not None:
                points.append(max(point, frugal, rules.local_below_tokens))
    return Tokens(min(points, default=0))


def _break_even_tokens(
    decoder: EngineView, prefiller: EngineView, context_tokens: int, rules: PlacementSettings
) -> int | None:
    """The largest append that the decoder still prefills at least as fast, rounded down; None when it always does."""
    streams = max(decoder.running, decoder.leases + 1)
    per_token_us = (MILLION + rules.harm_weight_ppm * streams) * MILLION // decoder.rate_tokens_per_s
    there_us = MILLION * MILLION // prefiller.rate_tokens_per_s + MILLION * MILLION // rules.transfer_tokens_per_s
    gain = per_token_us - there_us
    if gain <= 0:
        return None
    fixed_us = context_tokens * MILLION // prefiller.rate_tokens_per_s + rules.transfer_overhead_us
    ahead_us = decoder.backlog_tokens * MILLION // decoder.rate_tokens_per_s
    return max(fixed_us - ahead_us, 0) * MILLION // gain


def _frugal_tokens(context_tokens: int, rules: PlacementSettings) -> int | None:
    """The least append beside which the context that a prefiller computes again is little enough; None: there is none.

    The smallest a with ``a * EXTRA // 10^6 >= context``, as `_choose_lowest_score` rounds it.
    """
    if not context_tokens:
        return 0
    return -(-context_tokens * MILLION // rules.extra_work_ppm) if rules.extra_work_ppm else None


def _move_us(tokens: int, rules: PlacementSettings) -> int:
    return rules.transfer_overhead_us + tokens * MILLION // rules.transfer_tokens_per_s


def _uncached(view: EngineView, input_tokens: int, cached: Mapping[EngineId, Tokens]) -> Tokens:
    return Tokens(max(input_tokens - cached.get(view.engine_id, 0), 0))


def _verdict(view: EngineView, decoder: EngineView, input_tokens: int, settings: BrokerSettings, now_ms: Ms) -> str:
    if view.state is not EngineState.READY:
        return view.state.value
    seen_ms = view.observed_at_ms
    if seen_ms is None or now_ms - seen_ms > settings.observation_max_age_ms:
        return "stale"
    group = view.spec.transfer_group
    if not group or group != decoder.spec.transfer_group:
        return "no_common_transfer_group"
    if view.block_size_tokens != decoder.block_size_tokens:
        return "block_size_differs"
    unknown = input_tokens  # a bound that is 0 is not known, and then there is none
    fits = input_tokens <= (view.kv_capacity_tokens or unknown) and input_tokens <= (
        view.max_model_len_tokens or unknown
    )
    return "fits" if fits else "prompt_too_long"


def _why_none(weighed: Sequence[Weighed]) -> str:
    verdicts = [candidate.verdict for candidate in weighed]
    if not verdicts:
        return "no_prefiller"
    return verdicts[0] if verdicts.count(verdicts[0]) == len(verdicts) else "no_usable_prefiller"


def _choose(plan: PrefillPlan, chosen: Weighed, *, rule: str, uncached_tokens: int) -> None:
    chosen.verdict = "chosen"
    plan.prefiller = chosen.view
    plan.rule = rule
    plan.uncached_tokens = Tokens(uncached_tokens)


def _choose_lowest_score(
    plan: PrefillPlan, decoder: EngineView, usable: Sequence[Weighed], rules: PlacementSettings
) -> None:
    """The lowest score wins, of those that compute little enough; ties stay on the decoder, then go to the lower id."""
    own = plan.decoder_uncached_tokens = plan.uncached_tokens
    most_tokens = own + own * rules.extra_work_ppm // MILLION
    for candidate in usable:
        if candidate.uncached_tokens > most_tokens:
            candidate.verdict = "extra_work"
    frugal = [candidate for candidate in usable if candidate.verdict == "fits"]
    if not frugal:
        plan.rule = _why_none(plan.weighed)
        return
    plan.rule = "score"
    plan.decoder_score_us = score_us(decoder, uncached_tokens=own, moved_tokens=None, rules=rules)
    for candidate in frugal:
        candidate.score_us = score_us(
            candidate.view, uncached_tokens=candidate.uncached_tokens, moved_tokens=own, rules=rules
        )
    best = min(frugal, key=lambda candidate: (candidate.score_us, candidate.view.spec.engine_id))
    if best.score_us < plan.decoder_score_us:
        _choose(plan, best, rule="score", uncached_tokens=best.uncached_tokens)

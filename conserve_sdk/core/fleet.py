"""The engines: what was configured, what was observed, and the state that follows from both.

=========  ==================================================================================================
state      when
=========  ==================================================================================================
GONE       scrapes fail and the last success is `gone_after_ms` old (for an engine never observed: its
           configuration, and never inside the grace after a restart)
UNKNOWN    never observed under this URL and model
SUSPECT    a client could not use the current incarnation and no newer scrape succeeded; or scrapes fail and the
           last success is `suspect_after_ms` old
MISFIT     serves another model or block size than configured, or another block size than its transfer group
DRAINING   asked to; keeps its leases and gets none
READY      none of the above
=========  ==================================================================================================

The first line that applies wins. Silence alone (no scrape attempted) changes no state: an old observation merely keeps
an engine out of placement, so that a broker whose scraper hangs drops nobody's lease.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from conserve_sdk.core.backlog import Backlog
from conserve_sdk.core.decisions import EngineStateChanged
from conserve_sdk.core.estimates import SAMPLE_MIN_TOKENS, averaged_rate, averaged_share_ppm
from conserve_sdk.core.events import (
    EngineFailureReported,
    EngineObserved,
    EngineRestarted,
    EngineSpec,
    EngineUnreachable,
)
from conserve_sdk.core.lease import Lease
from conserve_sdk.core.occupancy import Occupancy
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import MILLION, EngineId, Incarnation, ModelName, Ms, Ppm, Tokens
from conserve_sdk.core.views import EngineView
from conserve_sdk.core.vocabulary import EngineState, Role


@dataclass(slots=True)
class _Engine:
    """Everything known about one engine."""

    spec: EngineSpec
    configured_at_ms: Ms
    draining: bool
    state: EngineState = EngineState.UNKNOWN
    detail: str = "not observed yet"
    seen: EngineObserved | None = None
    seen_first: int = 0
    """Order of first observation of this incarnation; the later of two that do not fit together is the misfit."""
    failing: str = ""
    """Why the last scrape failed; empty while scrapes succeed."""
    reported: tuple[Ms, str] | None = None
    """When and how a client last failed on the current incarnation."""
    misfit: str = ""
    rate_tokens_per_s: int = 0
    prefill_share_ppm: Ppm = Ppm(0)
    reports_cached: bool = False
    """Whether it ever told a client how much it had cached (vLLM: `--enable-prompt-tokens-details`)."""
    lost_caches: int = 0
    lost_share_ppm: Ppm = Ppm(0)
    backlog: Backlog = field(default_factory=Backlog)


class Fleet:
    """The configured engines, by id."""

    def __init__(self, settings: BrokerSettings, occupancy: Occupancy) -> None:
        self._settings = settings
        self._occupancy = occupancy
        self._engines: dict[EngineId, _Engine] = {}
        self._of_model: dict[ModelName, dict[EngineId, int]] = {}
        """Ordered by id; with each engine's place in that order."""
        self._views: dict[EngineId, EngineView] = {}
        self._listed: dict[ModelName, tuple[EngineView, ...]] = {}
        """`views_of_model`, as asked for last: every decision asks for it, and few of a large fleet's views change."""
        self._outdated: dict[ModelName, dict[EngineId, None]] = {}
        """Engines whose views in `_listed` are old ones."""
        self._failing: dict[EngineId, None] = {}
        self._observations = count(1)
        self._never_gone_before_ms = Ms(0)
        self._prune_at_ms: Ms | None = None
        """No backlog entry is too old before this instant."""

    # ---- reading ----

    def view(self, engine_id: EngineId) -> EngineView | None:
        """One engine, or None when it is not configured. Views are kept until something of the engine changes."""
        return self._views.get(engine_id) or self._fresh_view(engine_id) if engine_id in self._engines else None

    def state_of(self, engine_id: EngineId) -> EngineState | None:
        """The state of an engine, or None when it is not configured."""
        engine = self._engines.get(engine_id)
        return None if engine is None else engine.state

    def views(self) -> tuple[EngineView, ...]:
        """All engines, ordered by id."""
        return self._views_of(tuple(sorted(self._engines)))

    def views_of_model(self, model: ModelName) -> tuple[EngineView, ...]:
        """The engines configured for a model, ordered by id."""
        views, outdated = self._listed.get(model), self._outdated.pop(model, None)
        if views is None:
            views = self._listed[model] = self._views_of(tuple(self._of_model.get(model, ())))
        elif outdated:
            places, listed = self._of_model[model], list(views)
            for engine_id in outdated:
                listed[places[engine_id]] = self._views.get(engine_id) or self._fresh_view(engine_id)
            views = self._listed[model] = tuple(listed)
        return views

    def next_deadline_ms(self) -> Ms | None:
        """When a failing engine will be suspect or gone, if none answers until then."""
        deadlines = [at_ms for engine_id in self._failing for at_ms in self._deadlines_of(self._engines[engine_id])]
        return min(deadlines, default=None)

    # ---- configuration ----

    def configure(self, spec: EngineSpec, *, draining: bool, now_ms: Ms) -> EngineStateChanged | None:
        """Add an engine or change its configuration. What was observed under another URL or model is forgotten."""
        engine = self._engines.get(spec.engine_id)
        if engine is None:
            engine = self._engines[spec.engine_id] = _Engine(
                spec, now_ms, draining, prefill_share_ppm=_unseen_share_ppm(spec)
            )
        else:
            engine.draining = engine.draining or draining
            moved = (engine.spec.url, engine.spec.model) != (spec.url, spec.model)
            engine.spec = spec
            if moved:
                self._forget_observations(engine, now_ms)
            elif engine.seen is not None:
                engine.misfit = self._misfit_of(engine, engine.seen)
        self._index()
        return self._settle(engine, now_ms)

    def remove(self, engine_id: EngineId) -> EngineStateChanged | None:
        """The engine is no longer configured."""
        engine = self._engines.pop(engine_id, None)
        if engine is None:
            return None
        self._failing.pop(engine_id, None)
        self.touch(engine_id)
        self._index()
        return _changed(engine, EngineState.GONE, "removed from the configuration")

    def drain(self, engine_id: EngineId, *, draining: bool, now_ms: Ms) -> EngineStateChanged | None:
        """Set or clear the draining flag."""
        engine = self._engines.get(engine_id)
        if engine is None:
            return None
        engine.draining = draining
        return self._settle(engine, now_ms)

    def spare_unobserved_until(self, at_ms: Ms) -> None:
        """Engines never observed are not gone before this instant (grace after a restart)."""
        self._never_gone_before_ms = at_ms

    # ---- observation ----

    def observe(self, event: EngineObserved) -> tuple[EngineStateChanged | None, bool]:
        """Take a successful scrape of a configured engine.

        Returns:
            The change of state, and whether the incarnation is another one than before (or the first).
        """
        engine = self._engines[event.engine_id]
        before = engine.seen
        if before is not None and before.incarnation == event.incarnation:
            another = False
            self._read_prefill_counters(engine, before, event)
        else:
            another = True
            engine.seen_first = next(self._observations)
            engine.backlog.clear()
            engine.prefill_share_ppm = _unseen_share_ppm(engine.spec)
            engine.lost_caches, engine.lost_share_ppm = 0, Ppm(0)
        engine.seen = event
        engine.failing = ""
        self._failing.pop(event.engine_id, None)
        if engine.reported is not None and (another or event.now_ms > engine.reported[0]):
            engine.reported = None
        engine.misfit = self._misfit_of(engine, event)
        changed = self._settle(engine, event.now_ms)
        if changed is None and before is not None and another:
            changed = _changed(engine, engine.state, "restarted")
        return changed, another

    def restart(self, event: EngineRestarted) -> EngineStateChanged | None:
        """Forget what was observed of the life that an engine says is over; None when it is another one already."""
        engine = self._engines.get(event.engine_id)
        if engine is None or engine.seen is None or engine.seen.incarnation != event.before:
            return None
        self._forget_observations(engine, event.now_ms)
        self.touch(event.engine_id)
        changed = _changed(engine, EngineState.UNKNOWN, "restarted, not observed yet")
        engine.state, engine.detail = changed.after, changed.detail
        return changed

    def fail(self, event: EngineUnreachable) -> EngineStateChanged | None:
        """Take a failed scrape."""
        engine = self._engines.get(event.engine_id)
        if engine is None:
            return None
        engine.failing = event.detail or "no answer"
        self._failing[event.engine_id] = None
        return self._settle(engine, event.now_ms)

    def report_failure(self, event: EngineFailureReported) -> EngineStateChanged | None:
        """Take a client's word that it could not use this incarnation; other incarnations are history."""
        engine = self._engines.get(event.engine_id)
        if engine is None or engine.seen is None or engine.seen.incarnation != event.incarnation:
            return None
        engine.reported = (event.now_ms, event.detail or "no detail")
        return self._settle(engine, event.now_ms)

    def advance(self, now_ms: Ms) -> list[EngineStateChanged]:
        """Time passed: age backlogs, and failing engines towards suspect and gone."""
        if self._prune_at_ms is not None and now_ms >= self._prune_at_ms:
            self._prune_backlogs(now_ms)
        changes = [self._settle(self._engines[engine_id], now_ms) for engine_id in sorted(self._failing)]
        return [change for change in changes if change is not None]

    # ---- leases on engines ----

    def touch(self, engine_id: EngineId) -> None:
        """Something an engine's view shows has changed."""
        view = self._views.pop(engine_id, None)
        if view is not None:
            view.derived.clear()  # some of it refers to the view: a cycle that only the collector would end
            self._outdated.setdefault(view.spec.model, {})[engine_id] = None

    def dispatch_prefill(self, lease: Lease, *, tokens: Tokens, now_ms: Ms) -> None:
        """The first turn of a fresh lease is on its way to the engine that prefills it."""
        engine_id = prefilling(lease)
        self._engines[engine_id].backlog.dispatch(lease.lease_id, tokens=tokens, now_ms=now_ms)
        if self._prune_at_ms is None:
            self._prune_at_ms = Ms(now_ms + self._settings.backlog_max_age_ms)
        self.touch(engine_id)

    def finish_prefill(self, lease: Lease) -> int:
        """The first turn ended or never will; returns the tokens that stood before it when it was dispatched."""
        engine = self._engines.get(prefilling(lease))
        if engine is None:
            return 0
        self.touch(engine.spec.engine_id)
        return engine.backlog.finish(lease.lease_id)

    def learn_rate(self, engine_id: EngineId, *, tokens: int, took_ms: Ms) -> None:
        """A client saw this engine prefill so many tokens in this time."""
        engine = self._engines.get(engine_id)
        if engine is not None and not _counts_prefill_time(engine):
            engine.rate_tokens_per_s = averaged_rate(engine.rate_tokens_per_s, tokens=tokens, took_ms=took_ms)
            self.touch(engine_id)

    def learn_cached(self, lease: Lease, *, expected_tokens: int, cached_tokens: int) -> bool:
        """A follow-up turn ended on its decoder; returns whether it found far less of its KV than it had left there.

        Args:
            lease: the lease.
            expected_tokens: the context of the turn before; 0 when unknown, as for first turns.
            cached_tokens: what the engine said it had cached; engines that never say it are not judged.
        """
        engine = self._engines.get(lease.decoder.engine_id)
        if engine is None:
            return False
        engine.reports_cached = engine.reports_cached or cached_tokens > 0
        if not engine.reports_cached or expected_tokens < SAMPLE_MIN_TOKENS:
            return False
        lost = 2 * cached_tokens < expected_tokens
        engine.lost_caches += lost
        engine.lost_share_ppm = Ppm((7 * engine.lost_share_ppm + MILLION * lost) // 8)
        self.touch(engine.spec.engine_id)
        return lost

    # ---- inside ----

    def _read_prefill_counters(self, engine: _Engine, before: EngineObserved, now: EngineObserved) -> None:
        """What was prefilled between two scrapes of one incarnation leaves the backlog and tells rate and share."""
        tokens = now.prefill_tokens_total - before.prefill_tokens_total
        busy_ms = now.prefill_busy_ms_total - before.prefill_busy_ms_total
        engine.backlog.drain(tokens)
        if busy_ms > 0:
            engine.rate_tokens_per_s = averaged_rate(engine.rate_tokens_per_s, tokens=tokens, took_ms=Ms(busy_ms))
        span_ms, rules = now.now_ms - before.now_ms, self._settings.placement
        if span_ms > 0:
            engine.prefill_share_ppm = averaged_share_ppm(
                engine.prefill_share_ppm,
                sample_ppm=_busy_share_ppm(
                    engine,
                    tokens=tokens,
                    busy_ms=busy_ms,
                    span_ms=span_ms,
                    default_rate_tokens_per_s=rules.default_rate_tokens_per_s,
                ),
                span_ms=span_ms,
                window_ms=rules.prefill_share_window_ms,
            )

    def _prune_backlogs(self, now_ms: Ms) -> None:
        max_age_ms = self._settings.backlog_max_age_ms
        oldest: list[Ms] = []
        for engine in self._engines.values():
            if engine.backlog.prune(until_ms=now_ms - max_age_ms):
                self.touch(engine.spec.engine_id)
            if engine.backlog.oldest_at_ms is not None:
                oldest.append(engine.backlog.oldest_at_ms)
        self._prune_at_ms = Ms(min(oldest) + max_age_ms) if oldest else None

    def _index(self) -> None:
        of_model: dict[ModelName, dict[EngineId, int]] = {}
        for engine_id in sorted(self._engines):
            places = of_model.setdefault(self._engines[engine_id].spec.model, {})
            places[engine_id] = len(places)
        self._of_model = of_model
        self._listed.clear()
        self._outdated.clear()

    def _views_of(self, engine_ids: tuple[EngineId, ...]) -> tuple[EngineView, ...]:
        return tuple([self._views.get(engine_id) or self._fresh_view(engine_id) for engine_id in engine_ids])

    def _fresh_view(self, engine_id: EngineId) -> EngineView:
        view = self._views[engine_id] = self._look(self._engines[engine_id])
        return view

    def _forget_observations(self, engine: _Engine, now_ms: Ms) -> None:
        engine.configured_at_ms = now_ms
        engine.seen = engine.reported = None
        engine.failing = engine.misfit = ""
        engine.rate_tokens_per_s = 0
        engine.prefill_share_ppm = _unseen_share_ppm(engine.spec)
        engine.lost_caches, engine.lost_share_ppm = 0, Ppm(0)
        engine.reports_cached = False
        engine.backlog.clear()
        self._failing.pop(engine.spec.engine_id, None)

    def _settle(self, engine: _Engine, now_ms: Ms) -> EngineStateChanged | None:
        self.touch(engine.spec.engine_id)
        state, detail = self._state_of(engine, now_ms)
        changed = None if state is engine.state else _changed(engine, state, detail)
        engine.state, engine.detail = state, detail
        return changed

    def _state_of(self, engine: _Engine, now_ms: Ms) -> tuple[EngineState, str]:
        if engine.failing and now_ms >= self._gone_at_ms(engine):
            return EngineState.GONE, f"no answer for too long: {engine.failing}"
        if engine.seen is None:
            return EngineState.UNKNOWN, engine.failing or "not observed yet"
        if engine.reported is not None:
            return EngineState.SUSPECT, f"a client could not use it: {engine.reported[1]}"
        if engine.failing and now_ms >= self._suspect_at_ms(engine.seen):
            return EngineState.SUSPECT, engine.failing
        if engine.misfit:
            return EngineState.MISFIT, engine.misfit
        return (EngineState.DRAINING, "asked to drain") if engine.draining else (EngineState.READY, "")

    def _suspect_at_ms(self, seen: EngineObserved) -> Ms:
        return Ms(seen.now_ms + self._settings.suspect_after_ms)

    def _gone_at_ms(self, engine: _Engine) -> Ms:
        if engine.seen is None:
            return Ms(max(engine.configured_at_ms + self._settings.gone_after_ms, self._never_gone_before_ms))
        return Ms(engine.seen.now_ms + self._settings.gone_after_ms)

    def _deadlines_of(self, engine: _Engine) -> list[Ms]:
        if engine.state is EngineState.GONE:
            return []
        if engine.seen is None or engine.state is EngineState.SUSPECT:
            return [self._gone_at_ms(engine)]
        return [self._suspect_at_ms(engine.seen), self._gone_at_ms(engine)]

    def _misfit_of(self, engine: _Engine, seen: EngineObserved) -> str:
        spec = engine.spec
        if spec.model not in seen.models:
            serves = ", ".join(seen.models) or "no model"
            return f"serves {serves}, is configured for {spec.model}: correct `model` or start it with that name"
        expected, found = spec.block_size_tokens, seen.block_size_tokens
        if expected not in {0, found}:
            return f"block size {found}, configured {expected}: correct `block_size_tokens` or start it with that size"
        other = self._earlier_peer(engine)
        if other is not None and other.seen is not None and other.seen.block_size_tokens != found:
            return (
                f"block size {found}, but {other.spec.engine_id} of transfer group {spec.transfer_group!r} has "
                f"{other.seen.block_size_tokens}: start both with one --block-size or use two transfer groups"
            )
        return ""

    def _earlier_peer(self, engine: _Engine) -> _Engine | None:
        """The engine that sets the block size of the transfer group: the fitting one observed first, before this."""
        spec = engine.spec
        peers = [
            peer
            for peer in self._engines.values()
            if peer.seen is not None
            and not peer.misfit
            and peer.state is not EngineState.GONE
            and peer.seen_first < engine.seen_first
            and (peer.spec.transfer_group, peer.spec.model) == (spec.transfer_group, spec.model)
        ]
        return min(peers, key=lambda peer: peer.seen_first, default=None) if spec.transfer_group else None

    def _look(self, engine: _Engine) -> EngineView:
        spec, seen = engine.spec, engine.seen
        account = self._occupancy.account(spec.engine_id)
        return EngineView(
            spec=spec,
            state=engine.state,
            detail=engine.detail,
            draining=engine.draining,
            incarnation=_incarnation(engine),
            observed_at_ms=seen.now_ms if seen else None,
            kv_capacity_tokens=spec.kv_capacity_tokens or (seen.kv_capacity_tokens if seen else Tokens(0)),
            kv_used_tokens=seen.kv_used_tokens if seen else Tokens(0),
            kv_leased_tokens=Tokens(account.leased_tokens),
            kv_active_tokens=Tokens(account.leased_tokens - (account.cold_tokens if spec.host_tier_tokens else 0)),
            kv_holding_tokens=Tokens(account.holding_tokens),
            prefill_share_ppm=engine.prefill_share_ppm,
            lost_caches=engine.lost_caches,
            lost_share_ppm=engine.lost_share_ppm,
            leases=account.leases,
            busy=account.busy,
            running=seen.running if seen else 0,
            waiting=seen.waiting if seen else 0,
            backlog_tokens=engine.backlog.tokens,
            rate_tokens_per_s=engine.rate_tokens_per_s or self._settings.placement.default_rate_tokens_per_s,
            block_size_tokens=seen.block_size_tokens if seen else spec.block_size_tokens,
            max_model_len_tokens=spec.max_model_len_tokens or (seen.max_model_len_tokens if seen else Tokens(0)),
        )


def prefilling(lease: Lease) -> EngineId:
    """The engine that prefills the lease's first turn."""
    return (lease.prefiller or lease.decoder).engine_id


def _incarnation(engine: _Engine) -> Incarnation | None:
    return engine.seen.incarnation if engine.seen else None


def _changed(engine: _Engine, state: EngineState, detail: str) -> EngineStateChanged:
    return EngineStateChanged(
        engine_id=engine.spec.engine_id,
        before=engine.state,
        after=state,
        incarnation=_incarnation(engine),
        detail=detail,
    )


def _counts_prefill_time(engine: _Engine) -> bool:
    return engine.seen is not None and engine.seen.prefill_busy_ms_total > 0


def _unseen_share_ppm(spec: EngineSpec) -> Ppm:
    """The prefill share before any was seen: a prefiller not known to have time to spare hosts nothing."""
    return Ppm(MILLION if spec.role is Role.PREFILLER else 0)


def _busy_share_ppm(engine: _Engine, *, tokens: int, busy_ms: int, span_ms: int, default_rate_tokens_per_s: int) -> int:
    """The share of a span in which an engine prefilled: counted, else its tokens over its rate.

    While the rate is unknown a prefiller with any work counts as busy, so that it hosts nothing; elsewhere that would
    be load that nobody saw, and the default rate stands in.
    """
    if _counts_prefill_time(engine):
        return busy_ms * MILLION // span_ms
    rate_tokens_per_s = engine.rate_tokens_per_s or default_rate_tokens_per_s
    if engine.rate_tokens_per_s == 0 and tokens > 0 and engine.spec.role is Role.PREFILLER:
        return MILLION
    return tokens * 1_000 * MILLION // (rate_tokens_per_s * span_ms)

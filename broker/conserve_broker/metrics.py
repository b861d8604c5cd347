"""The broker's own metrics for Prometheus. Totals are read from the core when scraped, so nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from conserve_broker._access_tables import DENIALS
from conserve_broker._connections import Connections
from conserve_broker.clock import BrokerClock
from conserve_broker.hold_releases import OUTCOMES as RELEASE_OUTCOMES
from conserve_broker.service import Observer
from conserve_sdk._desk import Outcome
from conserve_sdk.core import MILLION, Broker, BrokerCounters, EngineView
from conserve_sdk.core.decisions import Granted
from conserve_sdk.core.units import Ms
from conserve_sdk.core.vocabulary import EngineState

__all__ = ["METRICS_MEDIA_TYPE", "ROLES", "BrokerMetrics"]

METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FAST_S = (0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05)
_WAIT_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_COMMIT_S = (0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)
ROLES = ("alone", "leader", "standby")
_GRANTING = frozenset({"request_lease", "supersede_lease"})


class BrokerMetrics(Observer):
    """One registry of its own, so that several brokers fit into one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._watched: _CoreState | None = None
        self._placement = Histogram(
            "conserve_placement_duration_seconds",
            "Time the desk and the core took to answer or queue one grant or supersede",
            buckets=_FAST_S,
            registry=self.registry,
        )
        self._wait = Histogram(
            "conserve_lease_wait_seconds",
            "Time from a request for a lease to its grant, admission queue included",
            buckets=_WAIT_S,
            registry=self.registry,
        )
        self._commit = Histogram(
            "conserve_journal_commit_seconds",
            "Time until a group of changes was durable",
            buckets=_COMMIT_S,
            registry=self.registry,
        )
        self._denied = Counter(
            "conserve_requests_denied",
            "Requests turned away because of their API key, by the problem's code",
            labelnames=["code"],
            registry=self.registry,
        )
        for code in DENIALS:  # there from the start, so that the first one shows as a rise
            self._denied.labels(code)
        self._requests = Counter(
            "conserve_api_key_requests",
            "Requests let in by the id of their API key; one that stands still can be taken away",
            labelnames=["key_id"],
            registry=self.registry,
        )
        self._hold_releases = Counter(
            "conserve_hold_releases",
            "Holds that engines were asked to end early, by what became of it",
            labelnames=["outcome"],
            registry=self.registry,
        )
        for outcome in RELEASE_OUTCOMES:
            self._hold_releases.labels(outcome)

    def watch_broker(self, *, role: Callable[[], str], listeners: Callable[[], int], connections: Connections) -> None:
        """Export what every broker has, one that stands by included."""
        self.registry.register(_BrokerState(role, listeners, connections))

    def watch(self, core: Broker, *, clock: BrokerClock) -> None:
        """Export this core's state from now on, in place of an earlier one's."""
        self.forget()
        self._watched = _CoreState(core, clock=clock)
        self.registry.register(self._watched)

    def forget(self) -> None:
        """Export no core's state any more: another broker leads."""
        if self._watched is not None:
            self.registry.unregister(self._watched)
            self._watched = None

    def handled(self, route: str, seconds: float) -> None:
        """See `Observer.handled`."""
        if route in _GRANTING:
            self._placement.observe(seconds)

    def decided(self, outcome: Outcome) -> None:
        """See `Observer.decided`."""
        for decision in outcome.decisions:
            if isinstance(decision, Granted) and not decision.reused:
                self._wait.observe(decision.lease.receipt.waited_ms / 1000)

    def committed(self, seconds: float) -> None:
        """See `Observer.committed`."""
        self._commit.observe(seconds)

    def admitted(self, key_id: str) -> None:
        """A request was let in with this API key."""
        self._requests.labels(key_id).inc()

    def denied(self, code: str) -> None:
        """A request was turned away at the gate."""
        self._denied.labels(code).inc()

    def hold_released(self, outcome: str) -> None:
        """An engine was asked to end a lease's hold; see `hold_releases.OUTCOMES`."""
        self._hold_releases.labels(outcome).inc()

    def page(self) -> bytes:
        """What `GET /metrics` answers."""
        return generate_latest(self.registry)


class _BrokerState(Collector):
    def __init__(self, role: Callable[[], str], listeners: Callable[[], int], connections: Connections) -> None:
        self._role = role
        self._listeners = listeners
        self._connections = connections

    def collect(self) -> Iterable[Metric]:
        role = GaugeMetricFamily("conserve_broker_role", "1 for the role this broker has now", labels=["role"])
        now = self._role()
        for each in ROLES:
            role.add_metric([each], each == now)
        yield role
        yield GaugeMetricFamily("conserve_event_listeners", "Clients that listen to events", value=self._listeners())
        yield GaugeMetricFamily("conserve_connections", "Open connections", value=self._connections.open)
        refused = CounterMetricFamily(
            "conserve_connections_refused", "Connections closed at once, by the bound on them", labels=["bound"]
        )
        for bound, count in self._connections.refused.items():
            refused.add_metric([bound], count)
        yield refused


class _CoreState(Collector):
    def __init__(self, core: Broker, *, clock: BrokerClock) -> None:
        self._core = core
        self._clock = clock

    def collect(self) -> Iterable[Metric]:
        core = self._core
        yield from self._totals()
        yield GaugeMetricFamily("conserve_leases_active", "Live leases", value=core.lease_count())
        states = GaugeMetricFamily("conserve_leases", "Live leases by state", labels=["state"])
        for activity, count in core.activities().items():
            states.add_metric([activity.value], count)
        yield states
        yield GaugeMetricFamily("conserve_waiting_requests", "Requests queued for admission", value=core.waiting())
        yield from _engine_gauges(core.engines(), now_ms=self._clock.now_ms())

    def _totals(self) -> Iterable[Metric]:
        counters = self._core.counters
        for name, value, text in (
            ("granted", counters.granted, "Leases granted"),
            ("reused", counters.reused, "Requests answered with a lease that was already live"),
            ("readopted", counters.readopted, "Leases put back into the ledger by their token"),
            ("renewed", counters.renewed, "Renewals, those by reports included"),
            ("released", counters.released, "Leases released by their holder"),
            ("expired", counters.expired, "Leases that expired"),
            ("superseded", counters.superseded, "Leases superseded by a later epoch"),
            ("parked", counters.parked, "Leases parked"),
            ("queued", counters.queued, "Requests that had to wait for admission"),
            ("failed_over", counters.failed_over, "Leases granted in place of one whose decoder failed"),
            (
                "spilled",
                counters.spilled,
                "Leases prefilled on their decoder because every prefiller would take longer",
            ),
        ):
            yield CounterMetricFamily(f"conserve_lease_{name}", text, value=value)
        refused = CounterMetricFamily("conserve_lease_refused", "Requests refused", labels=["reason"])
        for reason, count in counters.refused.items():
            refused.add_metric([reason.value], count)
        yield refused
        yield CounterMetricFamily(
            "conserve_migrations", "Leases whose KV cache was moved (once each)", value=counters.migrations
        )
        yield CounterMetricFamily(
            "conserve_engine_restarts", "Changes of incarnation seen", value=counters.engine_restarts
        )
        yield from _rule_totals(counters)


def _rule_totals(counters: BrokerCounters) -> Iterable[Metric]:
    for name, text, label, values in (
        ("placement_decoder_rules", "Grants by the rule that chose the decoder", "rule", counters.decoder_rules),
        ("placement_prefill_rules", "Grants by the rule that chose where to prefill", "rule", counters.prefill_rules),
        ("re_lease_directives", "Leases told to move", "reason", counters.directives),
        ("re_lease_moves", "Leases that moved to another decoder as they were told", "reason", counters.moved),
        ("move_stays", "Requests to move that were answered with the live lease", "cause", counters.stayed),
    ):
        family = CounterMetricFamily(f"conserve_{name}", text, labels=[label])
        for each, count in values.items():
            family.add_metric([str(each)], count)
        yield family
    yield CounterMetricFamily(
        "conserve_re_lease_withdrawn", "Directives withdrawn before they were followed", value=counters.withdrawn
    )
    yield CounterMetricFamily(
        "conserve_lost_caches", "Follow-up turns that found far less KV than was left", value=counters.lost_caches
    )


def _engine_gauges(views: tuple[EngineView, ...], *, now_ms: Ms) -> Iterable[Metric]:
    occupancy = GaugeMetricFamily(
        "conserve_decoder_kv_occupancy_ratio",
        "KV tokens held by live leases over the decoder's capacity",
        labels=["engine_id"],
    )
    capacity_tokens = GaugeMetricFamily(
        "conserve_decoder_kv_capacity_tokens", "KV tokens that the engine can hold", labels=["engine_id"]
    )
    used = GaugeMetricFamily(
        "conserve_decoder_kv_used_tokens", "KV tokens in use as the engine itself told last", labels=["engine_id"]
    )
    leases = GaugeMetricFamily("conserve_decoder_leases", "Live leases on the engine", labels=["engine_id"])
    leased = GaugeMetricFamily(
        "conserve_decoder_kv_leased_tokens", "KV tokens held by live leases", labels=["engine_id"]
    )
    active = GaugeMetricFamily(
        "conserve_decoder_kv_active_tokens", "KV tokens held by leases that are active", labels=["engine_id"]
    )
    share = GaugeMetricFamily(
        "conserve_engine_prefill_share_ratio", "Share of time with prefill work, averaged", labels=["engine_id"]
    )
    lost = GaugeMetricFamily(
        "conserve_engine_lost_caches", "Caches lost between turns since the engine's start", labels=["engine_id"]
    )
    backlog = GaugeMetricFamily(
        "conserve_engine_backlog_tokens", "Prompt tokens dispatched, first token not yet seen", labels=["engine_id"]
    )
    age = GaugeMetricFamily(
        "conserve_observation_age_seconds", "Age of the last successful scrape", labels=["engine_id"]
    )
    state = GaugeMetricFamily(
        "conserve_engine_state", "1 for the state the engine is in", labels=["engine_id", "state"]
    )
    for view in views:
        name = view.spec.engine_id
        capacity = view.kv_capacity_tokens
        occupancy.add_metric([name], view.kv_leased_tokens / capacity if capacity else 0.0)
        capacity_tokens.add_metric([name], capacity)
        used.add_metric([name], view.kv_used_tokens)
        leases.add_metric([name], view.leases)
        leased.add_metric([name], view.kv_leased_tokens)
        active.add_metric([name], view.kv_active_tokens)
        share.add_metric([name], view.prefill_share_ppm / MILLION)
        lost.add_metric([name], view.lost_caches)
        backlog.add_metric([name], view.backlog_tokens)
        if view.observed_at_ms is not None:
            age.add_metric([name], (now_ms - view.observed_at_ms) / 1000)
        for each in EngineState:
            state.add_metric([name, each.value], each is view.state)
    return occupancy, capacity_tokens, used, leases, leased, active, share, lost, backlog, age, state

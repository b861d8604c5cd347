"""The production broker core in virtual time: the shell that the service is in real time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

from conserve_lab.simulator.engine import SimulatedEngine
from conserve_lab.simulator.invariants import Invariants
from conserve_lab.simulator.kernel import Kernel, Timer
from conserve_sdk.core import Broker
from conserve_sdk.core.decisions import Decision, Granted, LeaseAnswered, LeaseDropped, Refused
from conserve_sdk.core.events import (
    EngineConfigured,
    EngineDrained,
    EngineFailureReported,
    EngineObserved,
    EngineSpec,
    EngineUnreachable,
    Event,
    LeaseReleased,
    LeaseRenewed,
    LeaseRequested,
    SupersedeRequested,
    TimerFired,
    TurnFinished,
    TurnStarted,
)
from conserve_sdk.core.lease import EngineBinding, Lease, LeaseKey
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import EngineId, Incarnation, LeaseId, Ms, PrefixKey, RequestId, Tokens
from conserve_sdk.core.vocabulary import Directive, SupersedeCause

SCRAPE_US = 1_000_000
"""The service's own interval; policy decisions get worse from 5 s on."""

RETRY_US = 1_000_000
"""Until a client that was refused asks again."""

Answer = Callable[[Lease], None]


class SimulatedBroker:
    """Feeds the core, checks its invariants as it goes, and hands its answers to whoever asked.

    Args:
        kernel: virtual time; the broker's milliseconds are its microseconds, cut.
        settings: as in production.
        engines: what it scrapes, with their specs, in the order of their ids.
    """

    def __init__(
        self, kernel: Kernel, settings: BrokerSettings, engines: Sequence[tuple[EngineSpec, SimulatedEngine]]
    ) -> None:
        self.core = Broker(settings)
        self._kernel = kernel
        self._engines = engines
        self._ids = count(1)
        self._asked: dict[RequestId, Answer] = {}
        self._refused: dict[RequestId, Callable[[], None]] = {}
        self._timer: Timer | None = None
        self._directives: dict[LeaseId, Directive] = {}
        self.invariants = Invariants(self.core, settings)
        self.live = True
        for spec, _ in engines:
            self._feed(EngineConfigured(now_ms=self.now_ms, spec=spec))
        self._scrape()

    @property
    def now_ms(self) -> Ms:
        """Its clock."""
        return Ms(self._kernel.now_us // 1000)

    # ---- what clients do --------------------------------------------------------------------------------------

    def request(self, key: LeaseKey, *, input_tokens: int, prefix_key: str, then: Answer) -> None:
        """Ask for a lease; `then` is called with it, at once or when there is room."""
        request_id = RequestId(f"q{next(self._ids)}")
        self._asked[request_id] = then
        self._feed(
            LeaseRequested(
                now_ms=self.now_ms,
                request_id=request_id,
                lease_id=LeaseId(f"l{next(self._ids)}"),
                key=key,
                first_turn_input_tokens=Tokens(input_tokens),
                first_turn_input_bytes=0,
                deadline_at_ms=Ms(1 << 50),
                prefix_key=PrefixKey(prefix_key),
            )
        )

    def replace(
        self,
        lease: Lease,
        *,
        input_tokens: int,
        cached_tokens: int,
        cause: SupersedeCause,
        then: Answer,
        failed: EngineId | None = None,
        refused: Callable[[], None] | None = None,
    ) -> None:
        """Ask for another lease in the place of this one; the answer may be the same one, or that there is no room."""
        request_id = RequestId(f"q{next(self._ids)}")
        self._asked[request_id] = then
        if refused is not None:
            self._refused[request_id] = refused
        self._directives.pop(lease.lease_id, None)
        self._feed(
            SupersedeRequested(
                now_ms=self.now_ms,
                request_id=request_id,
                lease_id=lease.lease_id,
                new_lease_id=LeaseId(f"l{next(self._ids)}"),
                key=lease.key,
                epoch=lease.epoch,
                reason=cause.value,
                cause=cause,
                cached_tokens=Tokens(cached_tokens),
                first_turn_input_tokens=Tokens(input_tokens),
                first_turn_input_bytes=0,
                deadline_at_ms=self.now_ms,
                failed_engine_id=failed,
            )
        )

    def lives(self, lease: Lease) -> bool:
        """Whether the broker still knows this lease; the SDK learns it from the answer to a report or renewal."""
        return self.core.lease(lease.lease_id) is not None

    def drain(self, engine_id: EngineId, *, draining: bool) -> None:
        """An operator drains an engine, or lets it take part again."""
        self._feed(EngineDrained(now_ms=self.now_ms, engine_id=engine_id, draining=draining))

    def failure(self, binding: EngineBinding) -> None:
        """A client could not use an engine."""
        self._feed(
            EngineFailureReported(
                now_ms=self.now_ms, engine_id=binding.engine_id, incarnation=binding.incarnation, detail="refused"
            )
        )

    def turn_started(self, lease: Lease, *, input_tokens: int) -> None:
        """A turn was sent."""
        self._feed(TurnStarted(now_ms=self.now_ms, lease_id=lease.lease_id, input_tokens=Tokens(input_tokens)))

    def turn_finished(self, report: TurnFinished) -> None:
        """A turn ended."""
        self.invariants.reported(report)
        self._feed(report)

    def renew(self, lease: Lease) -> None:
        """The conversation is alive, if silent."""
        self._feed(LeaseRenewed(now_ms=self.now_ms, lease_id=lease.lease_id))

    def release(self, lease: Lease) -> None:
        """The conversation is over."""
        self._feed(LeaseReleased(now_ms=self.now_ms, lease_id=lease.lease_id))

    def wants_move(self, lease: Lease) -> bool:
        """Whether the broker wants another lease for this conversation before its next turn."""
        return self._directives.get(lease.lease_id) is Directive.RE_LEASE

    # ---- the shell --------------------------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        self._carry_out(self.core.apply(event))
        self._plan_timer()

    def _carry_out(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Granted():
                    self.invariants.granted(decision)
                    then = self._asked.pop(decision.request_id)
                    self._refused.pop(decision.request_id, None)
                    self._kernel.after(0, lambda then=then, lease=decision.lease: then(lease))  # type: ignore[misc]
                case Refused():
                    del self._asked[decision.request_id]
                    otherwise = self._refused.pop(decision.request_id, None)
                    assert otherwise is not None, f"refused in spite of endless patience: {decision.detail}"
                    self._kernel.after(RETRY_US, otherwise)
                case LeaseAnswered():
                    self._directives[decision.lease_id] = decision.directive
                case LeaseDropped():
                    self.invariants.dropped(decision, now_ms=self.now_ms)
                    self._directives.pop(decision.lease.lease_id, None)

    def _plan_timer(self) -> None:
        due_ms = self.core.next_deadline_ms()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if due_ms is not None and self.live:
            self._timer = self._kernel.at(max(due_ms * 1000, self._kernel.now_us), self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._feed(TimerFired(now_ms=self.now_ms))

    def _scrape(self) -> None:
        if not self.live:
            return
        for spec, engine in self._engines:
            if not engine.up:
                self._feed(EngineUnreachable(now_ms=self.now_ms, engine_id=spec.engine_id, detail="refused"))
                continue
            engine.settle()
            model, counters = engine.model, engine.model.counters
            self._feed(
                EngineObserved(
                    now_ms=self.now_ms,
                    engine_id=spec.engine_id,
                    incarnation=Incarnation(str(engine.incarnation)),
                    models=(spec.model,),
                    kv_capacity_tokens=Tokens(model.config.kv_capacity_tokens),
                    kv_used_tokens=Tokens(model.pool.used * model.config.block_size),
                    block_size_tokens=Tokens(model.config.block_size),
                    max_model_len_tokens=Tokens(model.config.kv_capacity_tokens),
                    running=model.running,
                    waiting=model.waiting,
                    prefill_tokens_total=Tokens(counters.local_compute_tokens),
                    prefill_busy_ms_total=Ms(engine.energy.prefill_us // 1000),
                )
            )
        self.invariants.check()
        self._kernel.after(SCRAPE_US, self._scrape)

    def stop(self) -> None:
        """No more scrapes and timers: the run is over."""
        self.live = False
        if self._timer is not None:
            self._timer.cancel()

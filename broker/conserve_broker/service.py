"""The broker's shell round the core: one event loop owns it, changes are durable before answers leave.

Everything here runs on one event loop and calls the desk directly, so no two events ever overlap. What is durable is
decided by the core (`LeaseStored`, `LeaseDropped`); what waits for it is every grant, also a reused one whose first
commit is still under way. When the journal cannot be written, conversations that hold a lease go on (their tokens can
bring them back), but no new lease is granted.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from conserve_broker._group_commit import GroupCommit
from conserve_broker._lease_codec import ShelvedReceipt, take_down
from conserve_broker.clock import BrokerClock
from conserve_broker.journal import Change, DrainFlag, JournalError, JournalPort, collector_paused
from conserve_broker.logbook import Log, Logbook, logger
from conserve_sdk._desk import Call, Desk, Outcome, Reply, Route
from conserve_sdk.core import Broker
from conserve_sdk.core.decisions import LeaseStored
from conserve_sdk.core.events import (
    EngineConfigured,
    EngineDrained,
    EngineRemoved,
    EngineSpec,
    Event,
    LeaseReleased,
    Recovered,
    RequestCancelled,
    TimerFired,
)
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import LeaseId, Ms, RequestId, TenantId
from conserve_sdk.core.vocabulary import EngineState
from conserve_sdk.protocol import LeaseGrant, Problem
from conserve_sdk.tokens import TokenSigner

__all__ = ["BrokerService", "Observer", "Readiness", "Waiter"]

_RANDOM_BYTES = 6
_FREEZE_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether new conversations can be served.

    Attributes:
        reasons: why not; empty when ready.
        warnings: what somebody should look at all the same.
        role: `alone`, or `leader` or `standby` among replicas.
        can_lead: a standby that knows all leases and would lead at once.
    """

    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    role: str = "alone"
    can_lead: bool = False

    @property
    def ready(self) -> bool:
        """No reason against it."""
        return not self.reasons


class Observer:
    """What metrics want to hear; the default hears nothing."""

    def handled(self, route: str, seconds: float) -> None:
        """A request went through the desk in `seconds`."""

    def decided(self, outcome: Outcome) -> None:
        """A request or another event led to these decisions."""

    def committed(self, seconds: float) -> None:
        """A group of changes became durable after `seconds`."""


@dataclass(frozen=True, slots=True)
class _Settled:
    reply: Reply
    commit: asyncio.Future[None] | None


class Waiter:
    """A request that waits for admission. Await `reply()`, or `cancel()` it when the caller went away."""

    def __init__(self, service: BrokerService, request_id: RequestId, future: asyncio.Future[_Settled]) -> None:
        self._service = service
        self._request_id = request_id
        self._future = future

    async def reply(self) -> Reply:
        """The answer, once the core gave it and it is durable."""
        settled = await self._future
        return await self._service.once_durable(settled.reply, settled.commit)

    def cancel(self) -> None:
        """Take the request out of the queue; harmless when it was answered meanwhile."""
        self._service.cancel(self._request_id)


class BrokerService:
    """Owns the core on the running event loop.

    Args:
        settings: of the core.
        engines: the configured fleet at the start.
        signer: signs and checks lease tokens.
        journal: what survives a restart; closed by `stop`.
        grace_ms: how long no recovered lease expires after a restart.
        clock: the broker's clock.
        observer: hears what metrics need.
        log: where decisions are logged.
        freeze_gc: keep the garbage collector away from live leases, after recovery and once a minute; for a process
            that does nothing else.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        engines: Sequence[EngineSpec],
        signer: TokenSigner,
        journal: JournalPort,
        grace_ms: int = 30_000,
        clock: BrokerClock | None = None,
        observer: Observer | None = None,
        log: Log | None = None,
        freeze_gc: bool = False,
    ) -> None:
        self.core = Broker(settings)
        self.clock = clock or BrokerClock()
        self.settings = settings
        self.log = log or logger()
        self._signer = signer
        self._logbook = Logbook(self.log)
        self._desk = self._new_desk()
        self._engines = tuple(engines)
        self._journal = journal
        self._grace_ms = Ms(grace_ms)
        self._observer = observer or Observer()
        self._request_numbers = itertools.count(1)
        self._waiters: dict[RequestId, asyncio.Future[_Settled]] = {}
        self._commits = GroupCommit(journal, ended=self._committed)
        self._fresh_files = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_ms: Ms | None = None
        self._freezer: asyncio.TimerHandle | None = None
        self._freeze_gc = freeze_gc
        self._stopping = False

    # ---- life ---------------------------------------------------------------------------------------------------

    async def start(self, *, more_engines: Callable[[Sequence[str]], Sequence[EngineSpec]] | None = None) -> None:
        """Recover from the journal and take the engines over.

        Args:
            more_engines: makes engines of the rows that the journal keeps of those that no file names.

        Raises:
            JournalError: the journal cannot be read.
        """
        recovery = await asyncio.to_thread(self._journal.load)
        engines = self._engines if more_engines is None else (*self._engines, *more_engines(recovery.engines))
        if recovery.core is not None:
            self.core = recovery.core
            self._desk = self._new_desk()
            self.clock.not_before(self.core.now_ms)
        for lease in recovery.leases:
            self.clock.not_before(lease.granted_at_ms)
        now_ms = self.clock.now_ms()
        with collector_paused():
            self.feed(Recovered(now_ms=now_ms, leases=recovery.leases, grace_ms=self._grace_ms))
            configured = {spec.engine_id for spec in engines}
            gone = [engine_id for engine_id in self.core.lease_engines() if engine_id not in configured]
            changes: list[Event] = [EngineRemoved(now_ms=now_ms, engine_id=engine_id) for engine_id in gone]
            changes += [
                EngineConfigured(now_ms=now_ms, spec=spec, draining=spec.engine_id in recovery.draining)
                for spec in engines
            ]
            if changes:
                self.feed(*changes)
        self.log.info("broker_recovered", leases=self.core.lease_count(), draining=list(recovery.draining))
        if self._freeze_gc:
            gc.freeze()  # without a collection: it would walk every lease, while callers wait for a new leader
            self._freezer = asyncio.get_running_loop().call_later(_FREEZE_EVERY_S, self._freeze)

    def quiesce(self) -> None:
        """Take no more requests and events, and answer everybody who waits. Safe to call twice."""
        self._stopping = True
        self._cancel_timers()
        for future in self._waiters.values():
            if not future.done():  # cancelled this instant: its owner has not come round to `cancel` yet
                future.set_result(_Settled(shutting_down(), None))
        self._waiters.clear()

    async def stop(self) -> None:
        """`quiesce`, write what is queued, close the journal. Leases live on in it."""
        self.quiesce()
        self._commits.flush()
        await asyncio.to_thread(self._journal.close)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def abandon(self) -> None:
        """End as a crash would: nobody is answered, nothing that is queued gets written."""
        self._stopping = True
        self._cancel_timers()
        self._journal.abandon()
        self._commits.flush()  # only to learn that it is too late
        if self._freeze_gc:
            gc.unfreeze()  # among replicas the process lives on without these leases

    def readiness(self) -> Readiness:
        """Whether new conversations can be served, and why not."""
        reasons = []
        if self._stopping:
            reasons.append("the broker is shutting down")
        if self._journal.failure:
            reasons.append(f"no new leases: {self._journal.failure}")
        views = self.core.engines()
        served = {view.spec.model for view in views if view.state is EngineState.READY}
        if not served:
            reasons.append("no engine is ready: see /v1/engines")
            return Readiness(reasons=tuple(reasons))
        idle = sorted({view.spec.model for view in views} - served)
        warnings = tuple(f"no engine of model {model} is ready: see /v1/engines" for model in idle)
        return Readiness(reasons=tuple(reasons), warnings=warnings)

    # ---- requests -----------------------------------------------------------------------------------------------

    async def handle(
        self,
        route: Route[Any],
        *,
        tenant: TenantId,
        every_tenant: bool = True,
        target: str = "",
        lease_token: str = "",
        raw: bytes = b"",
    ) -> Reply | Waiter:
        """Serve one request: its answer, durable, or a waiter when it has to queue for admission."""
        if self._stopping:
            return shutting_down()
        if route.whole:
            await self._complete(LeaseId(target))
        started = time.perf_counter()
        call = Call(
            now_ms=self.clock.now_ms(),
            tenant=tenant,
            every_tenant=every_tenant,
            target=target,
            lease_token=lease_token,
            raw=raw,
        )
        outcome = self._desk.handle(route, call)
        self._observer.handled(route.name, time.perf_counter() - started)
        commit = self._carry_out(outcome)
        if outcome.reply is not None:
            return await self.once_durable(outcome.reply, commit)
        assert outcome.waiting is not None, "a request is answered or waits"
        future: asyncio.Future[_Settled] = asyncio.get_running_loop().create_future()
        self._waiters[outcome.waiting] = future
        return Waiter(self, outcome.waiting, future)

    def feed(self, *events: Event) -> None:
        """Apply events that no client sent (observations, configuration, timers). On the event loop only."""
        if not self._stopping:
            self._carry_out(self._desk.feed(*events))

    def cancel(self, request_id: RequestId) -> None:
        """The caller of a waiting request went away."""
        future = self._waiters.pop(request_id, None)
        if future is not None:
            future.cancel()
            self._logbook.forget(request_id)
            self.feed(RequestCancelled(now_ms=self.clock.now_ms(), request_id=request_id))

    async def once_durable(self, reply: Reply, commit: asyncio.Future[None] | None) -> Reply:
        """The reply, after the commit it depends on; a new lease that could not be written is taken back."""
        if commit is None:
            return reply
        try:
            await asyncio.shield(commit)
        except JournalError as failure:
            grant = reply.body
            if not isinstance(grant, LeaseGrant) or grant.supersedes is not None:
                return reply
            if not grant.reused:
                self.feed(LeaseReleased(now_ms=self.clock.now_ms(), lease_id=LeaseId(grant.lease_id)))
            return journal_failed(str(failure), retry_after_ms=self.settings.retry_after_ms)
        return reply

    # ---- inside -------------------------------------------------------------------------------------------------

    def write(self, *changes: Change) -> None:
        """Have the journal keep what the core does not know of (engines that no file names)."""
        if not self._stopping:
            self._commits.submit(changes)

    def _carry_out(self, outcome: Outcome) -> asyncio.Future[None] | None:
        """Submit the changes, settle those who waited, arm the timer. Returns the commit that answers depend on."""
        drains = [
            DrainFlag(event.engine_id, event.draining) for event in outcome.events if isinstance(event, EngineDrained)
        ]
        changes = [*outcome.changes, *drains]
        self._commits.submit(changes)
        commit = self._commits.pending
        for request_id, reply in outcome.settled:
            future = self._waiters.pop(request_id, None)
            if future is not None and not future.done():
                future.set_result(_Settled(reply, commit))
        self._observer.decided(outcome)
        self._logbook.write(outcome)
        self._arm_timer()
        granted = outcome.reply is not None and type(outcome.reply.body) is LeaseGrant
        return commit if changes or granted else None

    def _committed(self, seconds: float, error: BaseException | None) -> None:
        if error is not None:
            self.log.error("journal_failed", detail=str(error))
        elif self._journal.fresh_files != self._fresh_files:
            self._fill_fresh_file()
        self._observer.committed(seconds)

    def _fill_fresh_file(self) -> None:
        """The journal goes on in a file that knows nothing of what lives: write all of it."""
        self._fresh_files = self._journal.fresh_files
        leases = [LeaseStored(lease=lease, fresh=True) for lease in self.core.leases()]
        drains = [DrainFlag(view.spec.engine_id, view.draining) for view in self.core.engines()]
        self.log.warning("journal_rewritten", leases=len(leases))
        self._commits.submit([*leases, *drains])

    async def _complete(self, lease_id: LeaseId) -> None:
        """Fetch the part of a recovered lease's receipt that was left in the journal."""
        lease = self.core.lease(lease_id)
        if lease is not None and type(lease.receipt) is ShelvedReceipt:
            text = await asyncio.wrap_future(self._journal.candidates(lease_id))
            with contextlib.suppress(ValueError):  # spoiled by hand: the rest of the receipt is still worth telling
                take_down(lease.receipt, text)

    def _arm_timer(self) -> None:
        deadline_ms = self.core.next_deadline_ms()
        if deadline_ms == self._timer_at_ms or self._stopping:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at_ms, self._timer = deadline_ms, None
        if deadline_ms is not None:
            delay_ms = max(0, deadline_ms - self.clock.now_ms())
            self._timer = asyncio.get_running_loop().call_later(delay_ms / 1000, self._timer_due)

    def _cancel_timers(self) -> None:
        for handle in (self._timer, self._freezer):
            if handle is not None:
                handle.cancel()

    def _timer_due(self) -> None:
        self._timer_at_ms = None
        now_ms, deadline_ms = self.clock.now_ms(), self.core.next_deadline_ms()
        if deadline_ms is not None and deadline_ms <= now_ms:
            self.feed(TimerFired(now_ms=now_ms))
        else:
            self._arm_timer()  # the deadline moved, or the loop's clock runs ahead of ours

    def _freeze(self) -> None:
        """Keep the collector from walking every live lease again and again (they hold no cycles)."""
        gc.collect(1)
        gc.freeze()
        self._freezer = asyncio.get_running_loop().call_later(_FREEZE_EVERY_S, self._freeze)

    def _new_desk(self) -> Desk:
        return Desk(self.core, settings=self.settings, signer=self._signer, new_id=self._new_id)

    def _new_id(self, kind: str) -> str:
        if kind == "lease":
            # By time first: leases granted together lie on the same pages of the journal, which its checkpoints write.
            return f"lease-{self.clock.now_ms():012x}{secrets.token_hex(_RANDOM_BYTES)}"
        return f"{kind}-{next(self._request_numbers)}"


def shutting_down() -> Reply:
    """503: another broker, or this one after its restart, will answer."""
    return _unavailable("shutting_down", "the broker is shutting down; try again in a moment", retry_after_ms=1_000)


def journal_failed(why: str, *, retry_after_ms: int) -> Reply:
    """503: a lease that would not survive a restart is not granted."""
    return _unavailable("journal_failed", f"no new lease can be made durable: {why}", retry_after_ms=retry_after_ms)


def _unavailable(code: str, detail: str, *, retry_after_ms: int) -> Reply:
    title = code.replace("_", " ").capitalize()
    problem = Problem(title=title, status=503, detail=detail, code=code, retry_after_ms=retry_after_ms)
    return Reply(status=503, body=problem)

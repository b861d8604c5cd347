"""Letting go: the KV that an engine holds for a lease is freed when the lease ends, parks or has moved away.

The broker asks because it alone sees every end, an agent's sudden death included, and it can sign for a lease that is
over. All of it is best effort and off the path of every answer: a hold that nobody ends runs out by itself. Which
engines can be asked is found out by asking: one whose holds belong to no leases says so, once in each of its lives.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import httpx2

from conserve_broker._engine_http import PLAIN, Door, EngineTrouble, release_hold
from conserve_broker.logbook import Log, logger
from conserve_broker.service import Observer
from conserve_sdk._desk import Outcome
from conserve_sdk.core.decisions import Granted, LeaseAnswered, LeaseDropped
from conserve_sdk.core.events import LeaseParked, TurnFinished
from conserve_sdk.core.lease import Activity, Lease
from conserve_sdk.core.units import EngineId, Incarnation, LeaseId, Ms
from conserve_sdk.core.vocabulary import DropReason
from conserve_sdk.tokens import TokenSigner, claims_of

__all__ = ["OUTCOMES", "HoldReleases"]

OUTCOMES = ("freed", "not_offered", "failed", "dropped")
"""What becomes of a release: done; the engine's holds end by themselves; it did not answer well; too many waited."""

TOKEN_MS = 15_000
CALL_TIMEOUT_S = 5.0
WAITING_MAX = 1_024
"""Releases that may wait for one engine; each takes it one token of work."""

_ENDS = frozenset({DropReason.RELEASED, DropReason.EXPIRED, DropReason.SUPERSEDED})
"""After any other reason the engine, and what it held, is gone."""


@dataclass(slots=True)
class _Line:
    """What waits for one engine: leases, each with the instant at which its hold is over anyway."""

    waiting: deque[tuple[Lease, Ms]] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None


class HoldReleases(Observer):
    """Hears what was decided, and asks the engines; an async context manager that ends what is under way.

    Args:
        signer: of lease tokens.
        now_ms: the broker's clock.
        new_transport: connections to one engine, closed when nothing waits for it any more.
        door_of: how each engine is asked.
        counted: hears each outcome (`OUTCOMES`).
        log: where failures are told, at debug level.
    """

    def __init__(
        self,
        signer: TokenSigner,
        *,
        now_ms: Callable[[], Ms],
        new_transport: Callable[[], httpx2.AsyncBaseTransport],
        door_of: Callable[[EngineId], Door] = lambda _: PLAIN,
        counted: Callable[[str], None] = lambda _: None,
        log: Log | None = None,
    ) -> None:
        self._signer = signer
        self._now_ms = now_ms
        self._new_transport = new_transport
        self._door_of = door_of
        self._counted = counted
        self._log = log or logger()
        self._lines: dict[EngineId, _Line] = {}
        self._unable: dict[EngineId, Incarnation] = {}
        self._still_read: dict[LeaseId, Lease] = {}
        """By the lease that superseded them: those whose KV its first turn still needs."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tasks = [line.task for line in self._lines.values() if line.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def forget(self) -> None:
        """Another broker leads: what waits here is not this one's any more."""
        self._still_read.clear()
        for line in self._lines.values():
            line.waiting.clear()

    def decided(self, outcome: Outcome) -> None:
        """See `Observer.decided`."""
        ended = [each for each in outcome.decisions if isinstance(each, LeaseDropped)]
        if ended:
            successors = {each.lease.supersedes: each.lease for each in outcome.decisions if isinstance(each, Granted)}
            for each in ended:
                self._let_go_later(each.lease.lease_id)
                if each.reason in _ENDS and each.lease.activity is not Activity.PARKED:
                    self._ended(each.lease, successors.get(each.lease.lease_id))
        parked = set()
        for event in outcome.events:
            if isinstance(event, TurnFinished):
                self._let_go_later(event.lease_id)
            elif isinstance(event, LeaseParked):
                parked.add(event.lease_id)
        if parked:
            self._parked(parked, outcome)

    # ---- which ---------------------------------------------------------------------------------------------------

    def _ended(self, lease: Lease, successor: Lease | None) -> None:
        engine_id = lease.decoder.engine_id
        after = () if successor is None else (successor.prefiller, successor.decoder)
        if successor is not None and any(engine is not None and engine.engine_id == engine_id for engine in after):
            self._still_read[successor.lease_id] = lease
        else:
            self._let_go(lease)

    def _parked(self, lease_ids: Collection[LeaseId], outcome: Outcome) -> None:
        for each in outcome.decisions:
            if isinstance(each, LeaseAnswered) and each.lease_id in lease_ids and each.lease is not None:
                self._let_go(each.lease)

    def _let_go_later(self, successor_id: LeaseId) -> None:
        """The first turn of a lease is over, or never will be: nobody reads its predecessor's KV any more."""
        lease = self._still_read.pop(successor_id, None) if self._still_read else None
        if lease is not None:
            self._let_go(lease)

    def _let_go(self, lease: Lease) -> None:
        held_until_ms = Ms(self._now_ms() + lease.hold_ms)
        if lease.activity is Activity.IDLE:
            held_until_ms = Ms(lease.activity_since_ms + lease.hold_ms)
        engine = lease.decoder
        if held_until_ms <= self._now_ms() or self._unable.get(engine.engine_id) == engine.incarnation:
            return
        line = self._lines.setdefault(engine.engine_id, _Line())
        if len(line.waiting) >= WAITING_MAX:
            self._counted("dropped")
            return
        line.waiting.append((lease, held_until_ms))
        if line.task is None:
            line.task = asyncio.create_task(self._serve(engine.engine_id, line), name=f"release {engine.engine_id}")

    # ---- asking --------------------------------------------------------------------------------------------------

    async def _serve(self, engine_id: EngineId, line: _Line) -> None:
        """Ask one engine, one release after another, until none waits."""
        transport = self._new_transport()
        try:
            while line.waiting:
                lease, held_until_ms = line.waiting.popleft()
                unable = self._unable.get(engine_id) == lease.decoder.incarnation
                if held_until_ms > self._now_ms() and not unable:
                    self._counted(await self._ask(transport, lease))
        finally:
            del self._lines[engine_id]
            await transport.aclose()

    async def _ask(self, transport: httpx2.AsyncBaseTransport, lease: Lease) -> str:
        engine = lease.decoder
        token = self._signer.sign(claims_of(lease, exp_ms=Ms(self._now_ms() + TOKEN_MS)))
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                freed = await release_hold(transport, engine.url, token, self._door_of(engine.engine_id))
        except (EngineTrouble, TimeoutError) as trouble:
            why = str(trouble) or f"no answer within {CALL_TIMEOUT_S:g} s"
            self._log.debug("hold_release_failed", engine_id=engine.engine_id, lease_id=lease.lease_id, detail=why)
            return "failed"
        if freed:
            return "freed"
        self._unable[engine.engine_id] = engine.incarnation
        return "not_offered"

"""Which engines there are, whoever said so: the file, DNS, or an engine of itself.

A file that no longer names an engine means it: it is removed at once. An engine that DNS forgets or that takes its
leave is drained first and goes with its last lease. One whose heartbeats stop is watched no more, so that the core
finds it suspect and then gone as it does with any engine that falls silent; then it is forgotten.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from conserve_broker.journal import DrainFlag, EngineRow
from conserve_broker.service import BrokerService
from conserve_sdk.core.events import (
    EngineConfigured,
    EngineDrained,
    EngineRemoved,
    EngineRestarted,
    EngineSpec,
    EngineUnreachable,
    Event,
)
from conserve_sdk.core.units import EngineId, Incarnation, Ms
from conserve_sdk.core.vocabulary import EngineState, Role

__all__ = ["FILE", "Membership"]

FILE = "file"
REGISTERED = "registered"
_DNS = "dns:"
_TICK_S = 0.2
_UNTOLD = Incarnation("")
_log = logging.getLogger("conserve.broker")


@dataclass(slots=True)
class _Member:
    """One engine.

    Attributes:
        origin: who named it: `FILE`, `REGISTERED`, or `dns:` and the name that was asked for.
        leaving: it is drained, and removed with its last lease.
        keeps_drain: it had been drained by an operator before it began to leave.
        heard_until_ms: end of the last heartbeat's word; None for members that need none.
        silent: that end has come.
        incarnation: what it called its life when it was heard of last; "" if it never said.
    """

    spec: EngineSpec
    origin: str
    ttl_ms: int = 0
    leaving: bool = False
    keeps_drain: bool = False
    heard_until_ms: Ms | None = None
    silent: bool = False
    incarnation: Incarnation = _UNTOLD


class Membership:
    """The engines of one broker, over all its leaderships. On the event loop only.

    Args:
        configured: the engines of the file.
        watch: called with the engines to be scraped whenever they change.
        now_ms: the broker's clock.
        grace_ms: how long a registered engine may take to be heard of again after a restart or a change of leaders.
    """

    def __init__(
        self,
        configured: Sequence[EngineSpec],
        *,
        watch: Callable[[Sequence[EngineSpec]], None],
        now_ms: Callable[[], Ms],
        grace_ms: int,
    ) -> None:
        self._members = {spec.engine_id: _Member(spec, FILE) for spec in configured}
        self._watch = watch
        self._now_ms = now_ms
        self._grace_ms = grace_ms
        self._service: BrokerService | None = None

    # ---- leaderships --------------------------------------------------------------------------------------------

    def restore(self, rows: Iterable[str]) -> tuple[EngineSpec, ...]:
        """A leadership begins: all engines, those from the journal's rows among them."""
        for row in rows:
            member = _member_of(row)
            if member is None or self.conflict(member.spec, origin=member.origin):
                continue
            if member.origin == REGISTERED:
                member.heard_until_ms = Ms(self._now_ms() + max(member.ttl_ms, self._grace_ms))
            self._members.setdefault(member.spec.engine_id, member)
        self._rewatch()
        return tuple(member.spec for member in self._members.values())

    def begin(self, service: BrokerService) -> None:
        """Tell this service of changes from now on."""
        self._service = service

    def end(self) -> None:
        """The leadership is over: what engines said to this broker is the next leader's to know."""
        self._service = None
        self._members = {key: one for key, one in self._members.items() if one.origin != REGISTERED and not one.leaving}
        self._rewatch()

    # ---- the sources --------------------------------------------------------------------------------------------

    def set_file(self, specs: Sequence[EngineSpec]) -> None:
        """The engines of the file, as it is now."""
        named = {spec.engine_id for spec in specs}
        for engine_id in [key for key, one in self._members.items() if one.origin == FILE and key not in named]:
            self._remove(engine_id)
        for spec in specs:
            self._put(_Member(spec, FILE))
        self._rewatch()

    def set_dns(self, name: str, specs: Sequence[EngineSpec]) -> None:
        """The engines that one name stands for, as the answer is now."""
        origin = _DNS + name
        found = {spec.engine_id for spec in specs}
        for engine_id, member in list(self._members.items()):
            if member.origin == origin and engine_id not in found:
                self._leave(member)
        for spec in specs:
            trouble = self.conflict(spec, origin=origin)
            if trouble:
                _log.warning("discovery: %s of %s is left out: %s", spec.engine_id, name, trouble)
            else:
                self._put(_Member(spec, origin))
        self._rewatch()

    def register(self, spec: EngineSpec, *, ttl_ms: int, incarnation: Incarnation = _UNTOLD) -> None:
        """An engine announced itself, or was heard of again; see `conflict` first."""
        before = self._members.get(spec.engine_id)
        if before is not None and before.incarnation and incarnation not in ("", before.incarnation):
            now_ms = self._now_ms()
            self._feed(
                EngineRestarted(
                    now_ms=now_ms, engine_id=spec.engine_id, before=before.incarnation, incarnation=incarnation
                )
            )
        heard_until_ms = Ms(self._now_ms() + ttl_ms)
        member = _Member(spec, REGISTERED, ttl_ms=ttl_ms, heard_until_ms=heard_until_ms, incarnation=incarnation)
        self._put(member)
        self._rewatch()

    def deregister(self, engine_id: EngineId) -> None:
        """An engine took its leave; it goes with its last lease."""
        member = self._members.get(engine_id)
        if member is not None and member.origin == REGISTERED:
            self._leave(member)

    def conflict(self, spec: EngineSpec, *, origin: str = REGISTERED) -> str:
        """Why an engine cannot be taken from this source; empty when it can."""
        same = self._members.get(spec.engine_id)
        if same is not None and same.origin != origin:
            return f"the id {spec.engine_id} is in use by an engine of another source ({same.origin})"
        for other in self._members.values():
            if other.spec.engine_id != spec.engine_id and other.spec.url == spec.url:
                return f"{spec.url} is in use by engine {other.spec.engine_id}"
        return ""

    def is_registered(self, engine_id: EngineId) -> bool:
        """Whether the engine announced itself and has not left."""
        member = self._members.get(engine_id)
        return member is not None and member.origin == REGISTERED and not member.leaving

    def announced_itself(self, engine_id: EngineId) -> bool:
        """Whether the engine is here by its own word, also while it leaves."""
        member = self._members.get(engine_id)
        return member is not None and member.origin == REGISTERED

    # ---- time ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            self.tick()

    def tick(self) -> None:
        """Let go of who has left, and notice who falls silent."""
        if self._service is None:
            return
        views = {view.spec.engine_id: view for view in self._service.core.engines()}
        now_ms = self._now_ms()
        for engine_id, member in list(self._members.items()):
            view = views.get(engine_id)
            left = member.leaving and (view is None or view.leases == 0)
            gone = member.silent and view is not None and view.state is EngineState.GONE
            if left or gone:
                self._remove(engine_id)
            elif member.heard_until_ms is not None and not member.silent and now_ms >= member.heard_until_ms:
                member.silent = True
                self._rewatch()
                detail = f"no heartbeat for {member.ttl_ms} ms"
                self._feed(EngineUnreachable(now_ms=now_ms, engine_id=engine_id, detail=detail))

    # ---- inside -------------------------------------------------------------------------------------------------

    def _put(self, member: _Member) -> None:
        """Add an engine, or take over what is new about it."""
        spec = member.spec
        before = self._members.get(spec.engine_id)
        self._members[spec.engine_id] = member
        if before is None or before.spec != spec:
            self._feed(EngineConfigured(now_ms=self._now_ms(), spec=spec))
        if before is not None and before.leaving and not before.keeps_drain:
            self._feed(EngineDrained(now_ms=self._now_ms(), engine_id=spec.engine_id, draining=False))
        if before is None or _row_of(before) != _row_of(member):
            self._keep(member)

    def _leave(self, member: _Member) -> None:
        if member.leaving:
            return
        engine_id = member.spec.engine_id
        if self._service is None:  # a standby holds no leases for anybody
            del self._members[engine_id]
            return
        view = next((view for view in self._service.core.engines() if view.spec.engine_id == engine_id), None)
        member.leaving = True
        member.keeps_drain = view is not None and view.draining
        member.heard_until_ms = None
        self._feed(EngineDrained(now_ms=self._now_ms(), engine_id=engine_id, draining=True))
        self._keep(member)

    def _remove(self, engine_id: EngineId) -> None:
        member = self._members.pop(engine_id)
        self._rewatch()
        self._feed(EngineRemoved(now_ms=self._now_ms(), engine_id=engine_id))
        if self._service is not None and member.origin != FILE:
            self._service.write(EngineRow(engine_id, None), DrainFlag(engine_id, False))

    def _keep(self, member: _Member) -> None:
        if self._service is not None:
            row = None if member.origin == FILE else _row_of(member)
            self._service.write(EngineRow(member.spec.engine_id, row))

    def _feed(self, event: Event) -> None:
        if self._service is not None:
            self._service.feed(event)

    def _rewatch(self) -> None:
        self._watch([member.spec for member in self._members.values() if not member.silent])


def _row_of(member: _Member) -> str:
    state = [member.origin, member.ttl_ms, member.leaving, member.keeps_drain, member.incarnation]
    return json.dumps([asdict(member.spec), *state], separators=(",", ":"))


def _member_of(row: str) -> _Member | None:
    """None for a row of another version: the engine will be heard of again."""
    try:
        spec, origin, ttl_ms, leaving, keeps_drain, incarnation = json.loads(row)
        fields: dict[str, Any] = {**spec, "role": Role(spec["role"])}
        return _Member(
            EngineSpec(**fields),
            str(origin),
            ttl_ms=int(ttl_ms),
            leaving=bool(leaving),
            keeps_drain=bool(keeps_drain),
            incarnation=Incarnation(incarnation),
        )
    except (ValueError, TypeError, KeyError) as error:
        _log.warning("an engine's row in the journal is not understood and left out (%s)", error)
        return None

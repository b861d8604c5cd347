"""What `GET /v1/events` tells: the state of the broker at one instant, and how the last minutes went."""

from __future__ import annotations

from importlib.metadata import version

from pydantic import BaseModel, ConfigDict

from conserve_broker.front import Front
from conserve_broker.history import FIELDS, History, totals_of
from conserve_broker.service import BrokerService
from conserve_sdk._desk import engine_info
from conserve_sdk.core.lease import Activity
from conserve_sdk.protocol import EngineInfo

__all__ = ["HistoryInfo", "LeaseCounts", "Snapshot", "Totals", "WaitingInfo", "history_of", "snapshot_of"]

WAITING_SHOWN_MAX = 50


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class LeaseCounts(_Told):
    """Live leases by state."""

    busy: int = 0
    idle: int = 0
    parked: int = 0


class Totals(_Told):
    """Counts since this broker began to decide; they begin at zero again after a restart or a change of leaders.

    Attributes:
        waits: requests that had to wait for admission.
        migrations: leases whose one KV transfer was reported.
        spill_overs: grants prefilled on their decoder because every prefiller would have taken longer.
        failovers: grants in place of a lease whose decoder failed.
    """

    grants: int = 0
    waits: int = 0
    refusals: int = 0
    migrations: int = 0
    spill_overs: int = 0
    failovers: int = 0


class WaitingInfo(_Told):
    """One request that waits for admission."""

    conversation_id: str
    tenant: str
    model: str
    need_tokens: int
    waited_ms: int
    left_ms: int


class Snapshot(_Told):
    """The broker at one instant.

    Attributes:
        at_ms: the broker's clock (Unix epoch).
        role: `alone`, `leader` or `standby`; a standby knows of no leases and no queue.
        leader_url: of a standby: who leads, as far as known.
        reasons: why no new conversation can be served; empty when ready.
        kv_watermark_ppm: admission keeps KV under this share of a decoder.
        waiting: the first of those who wait, in the order of arrival; `waiting_requests` counts all.
    """

    at_ms: int
    version: str
    role: str
    leader_url: str
    ready: bool
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    preset: str = ""
    kv_watermark_ppm: int = 1_000_000
    engines: tuple[EngineInfo, ...] = ()
    leases: LeaseCounts = LeaseCounts()
    waiting_requests: int = 0
    waiting: tuple[WaitingInfo, ...] = ()
    totals: Totals = Totals()


class HistoryInfo(_Told):
    """Totals over time.

    Attributes:
        fields: what the numbers of a sample are, after its instant.
        samples: `[at_ms, total, ...]`, oldest first, about five seconds apart.
    """

    fields: tuple[str, ...] = FIELDS
    samples: tuple[tuple[int, ...], ...] = ()


def snapshot_of(front: Front, *, now_ms: int) -> Snapshot:
    """The state as it is now; costs about 15 us and 10 us for each engine."""
    state = front.readiness()
    base = Snapshot(
        at_ms=now_ms,
        version=version("conserve-sdk"),
        role=state.role,
        leader_url=front.leader_url,
        ready=state.ready,
        reasons=state.reasons,
        warnings=state.warnings,
    )
    service = front.service
    return base if service is None or state.role == "standby" else base.model_copy(update=_decided_by(service))


def history_of(history: History) -> HistoryInfo:
    """The samples as they are told."""
    return HistoryInfo(samples=history.samples)


def _decided_by(service: BrokerService) -> dict[str, object]:
    core, now_ms = service.core, service.clock.now_ms()
    activities = core.activities()
    return {
        "at_ms": now_ms,
        "preset": service.settings.placement.name,
        "kv_watermark_ppm": service.settings.placement.kv_watermark_ppm,
        "engines": tuple(engine_info(view, now_ms=now_ms) for view in core.engines()),
        "leases": LeaseCounts(**{each.value: activities[each] for each in Activity}),
        "waiting_requests": core.waiting(),
        "waiting": tuple(
            WaitingInfo(
                conversation_id=request.key.conversation_id,
                tenant=request.key.tenant,
                model=request.key.model,
                need_tokens=request.need_tokens,
                waited_ms=now_ms - request.asked_at_ms,
                left_ms=max(0, request.deadline_at_ms - now_ms),
            )
            for request in core.waiting_requests(most=WAITING_SHOWN_MAX)
        ),
        "totals": Totals(**dict(zip(FIELDS, totals_of(core), strict=True))),
    }

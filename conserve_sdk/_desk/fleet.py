"""Handlers of the routes of engines and the fleet."""

from __future__ import annotations

from conserve_sdk._desk.outcome import Reply
from conserve_sdk._desk.problems import engine_unknown
from conserve_sdk._desk.visit import Visit
from conserve_sdk._desk.wire import advice_info, engine_info, fleet_info
from conserve_sdk.core import EngineView
from conserve_sdk.core.events import EngineDrained
from conserve_sdk.core.units import EngineId
from conserve_sdk.protocol import EngineList


def list_engines(visit: Visit, _: None) -> Reply:
    """`GET /v1/engines`."""
    engines = tuple(engine_info(view, now_ms=visit.now_ms) for view in visit.core.engines())
    return Reply(status=200, body=EngineList(engines=engines))


def read_engine(visit: Visit, _: None) -> Reply:
    """`GET /v1/engines/{id}`."""
    return Reply(status=200, body=engine_info(_engine(visit), now_ms=visit.now_ms))


def drain_engine(visit: Visit, _: None) -> Reply:
    """`POST /v1/engines/{id}/drain`: it keeps its leases and gets no new one."""
    return _drained(visit, draining=True)


def undrain_engine(visit: Visit, _: None) -> Reply:
    """`POST /v1/engines/{id}/undrain`."""
    return _drained(visit, draining=False)


def read_fleet(visit: Visit, _: None) -> Reply:
    """`GET /v1/fleet`."""
    return Reply(status=200, body=fleet_info(visit.core, preset=visit.preset, now_ms=visit.now_ms))


def read_advice(visit: Visit, _: None) -> Reply:
    """`GET /v1/advice`."""
    return Reply(status=200, body=advice_info(visit.core, preset=visit.preset))


def _drained(visit: Visit, *, draining: bool) -> Reply:
    engine_id: EngineId = _engine(visit).spec.engine_id
    visit.apply(EngineDrained(now_ms=visit.now_ms, engine_id=engine_id, draining=draining))
    return read_engine(visit, None)


def _engine(visit: Visit) -> EngineView:
    views = {view.spec.engine_id: view for view in visit.core.engines()}
    found = views.get(EngineId(visit.call.target))
    if found is None:
        raise engine_unknown(visit.call.target[:64], list(views))
    return found

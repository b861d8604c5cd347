"""Handler of the list of leases: pages over the live table, bounded in what they hold and in what they look at."""

from __future__ import annotations

from collections.abc import Callable

from conserve_sdk._desk.outcome import Reply
from conserve_sdk._desk.visit import Visit
from conserve_sdk._desk.wire import lease_summary
from conserve_sdk.core.lease import Lease
from conserve_sdk.core.units import Ms
from conserve_sdk.protocol import LeaseList, LeaseQuery, LeaseSummary

LOOKED_AT_MAX = 20_000
"""Leases that one page looks at: about 5 ms, for which nobody else is served."""


def list_leases(visit: Visit, query: LeaseQuery) -> Reply:
    """`GET /v1/leases`, for operators: no token shown.

    A cursor is a place in the table and how many leases had ended by then. Leases leave the table anywhere and enter it
    at its end, so what stood at a place has since moved towards the front by the ends in between at most.
    """
    core = visit.core
    start, _, ended = query.cursor.partition("-")
    place = max(0, int(start) - (core.leases_ended() - int(ended))) if query.cursor else 0
    found: list[LeaseSummary] = []
    filters = _filters(query, visit.now_ms)
    end = min(place + LOOKED_AT_MAX, core.lease_count())
    for lease in core.leases_from(place):
        if place == end or len(found) == query.limit:
            break
        place += 1
        if all(holds(lease) for holds in filters):
            found.append(lease_summary(lease, now_ms=visit.now_ms))
    more = place < core.lease_count()
    cursor = f"{place}-{core.leases_ended()}" if more else None
    return Reply(status=200, body=LeaseList(leases=tuple(found), live=core.lease_count(), next_cursor=cursor))


def _filters(query: LeaseQuery, now_ms: Ms) -> list[Callable[[Lease], bool]]:
    """What a lease has to satisfy, for the parameters that were given."""
    newest_ms, oldest_ms = now_ms - query.min_age_ms, now_ms - (query.max_age_ms or 0)
    filters: tuple[tuple[object, Callable[[Lease], bool]], ...] = (
        (query.conversation_id, lambda lease: lease.key.conversation_id == query.conversation_id),
        (query.tenant, lambda lease: lease.key.tenant == query.tenant),
        (query.model, lambda lease: lease.key.model == query.model),
        (query.state, lambda lease: lease.activity.value == query.state),
        (query.engine_id, lambda lease: query.engine_id in _engines(lease)),
        (query.min_age_ms or None, lambda lease: lease.granted_at_ms <= newest_ms),
        (query.max_age_ms, lambda lease: lease.granted_at_ms >= oldest_ms),
    )
    return [holds for given, holds in filters if given is not None]


def _engines(lease: Lease) -> tuple[str, ...]:
    decoder = lease.decoder.engine_id
    return (decoder,) if lease.prefiller is None else (decoder, lease.prefiller.engine_id)

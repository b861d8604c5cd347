"""`conserve leases`: the live leases that match, page after page."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlencode

from rich.table import Table

from conserve_broker.admin import ask, output, print_json, seconds
from conserve_sdk.protocol import LEASES_LISTED_MAX, LeaseList, LeaseQuery, LeaseSummary

__all__ = ["list_leases"]


def list_leases(broker_url: str, query: LeaseQuery, *, as_json: bool, limit: int) -> None:
    """Print the live leases that match, in the order in which they went live.

    Args:
        broker_url: where the broker answers.
        query: what to look for; its own limit and cursor do not count.
        as_json: print one `LeaseList`.
        limit: how many at most.

    Raises:
        AdminError: unreachable broker, or a query that it does not take.
    """
    found: dict[str, LeaseSummary] = {}
    live, more = 0, False
    for page in _pages(broker_url, query, limit):
        live = page.live
        found.update((lease.lease_id, lease) for lease in page.leases)
        more = page.next_cursor is not None
        if len(found) >= limit:
            break
    shown = tuple(found.values())[:limit]
    if as_json:
        print_json(LeaseList(leases=shown, live=live, next_cursor=None))
        return
    console = output()
    console.print(_table(shown))
    rest = f"; --limit {limit} ends the list" if more and len(found) >= limit else ""
    console.print(f"{len(shown)} shown of {live} live{rest}")


def _pages(broker_url: str, query: LeaseQuery, limit: int) -> Iterator[LeaseList]:
    asked = query.model_dump(exclude_none=True, exclude_defaults=True) | {"limit": min(limit, LEASES_LISTED_MAX)}
    cursor: str | None = ""
    while cursor is not None:
        page = ask("GET", broker_url, f"/v1/leases?{urlencode({**asked, 'cursor': cursor})}", LeaseList)
        yield page
        cursor = page.next_cursor


def _table(leases: tuple[LeaseSummary, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("lease", "conversation", "tenant", "state", "decoder", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "turns", "moves", "age", "ends in"):
        table.add_column(name, justify="right", no_wrap=True)
    for lease in leases:
        table.add_row(
            lease.lease_id,
            lease.conversation_id,
            lease.tenant,
            lease.state,
            lease.decoder,
            lease.mode,
            f"{lease.ledger_tokens:,}",
            str(lease.turns),
            str(lease.migrations),
            seconds(lease.granted_ago_ms),
            seconds(lease.expires_in_ms),
        )
    return table

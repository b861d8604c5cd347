"""Engines found by DNS: every name is asked for again and again; a question that fails keeps the last answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING

from conserve_broker._config_errors import ConfigProblem
from conserve_broker._discovery_tables import DiscoveryTable, DnsTable
from conserve_sdk.core.events import EngineSpec

if TYPE_CHECKING:
    from dns.nameserver import Do53Nameserver

__all__ = ["DnsWatcher"]

_DNS_PORT = 53
_log = logging.getLogger("conserve.broker")


class DnsWatcher:
    """Asks for the names of `[discovery]`.

    An answer that says "no such name" or "no such records" is an answer: nobody is there. No answer, or an error of
    the server, says nothing about the engines.

    Args:
        settings: what to ask for, whom and how often.
        found: called with a name and its engines after each answer.

    Raises:
        ConfigProblem: dnspython is not installed, or a nameserver is no address.
    """

    def __init__(self, settings: DiscoveryTable, *, found: Callable[[str, Sequence[EngineSpec]], None]) -> None:
        try:
            import dns.asyncresolver
            import dns.exception
            import dns.resolver
        except ImportError as error:
            raise ConfigProblem(
                ["discovery.dns: needs dnspython; install it with `pip install 'conserve-sdk[dns]'`"]
            ) from error
        self._settings = settings
        self._found = found
        self._problems: dict[str, str] = {}
        self._nobody: tuple[type[Exception], ...] = (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer)
        self._trouble: type[Exception] = dns.exception.DNSException
        try:
            self._resolver = dns.asyncresolver.Resolver(configure=not settings.nameservers)
            if settings.nameservers:
                self._resolver.nameservers = [_server(text) for text in settings.nameservers]
        except (ValueError, dns.exception.DNSException) as error:
            raise ConfigProblem([f"discovery.nameservers: {error}; write addresses like '10.0.0.2'"]) from error

    @property
    def problems(self) -> tuple[str, ...]:
        """Names that could not be asked for lately, and why."""
        return tuple(f"discovery.dns: {name}: {why}; the last answer holds" for name, why in self._problems.items())

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._settings.refresh_ms / 1000)

    async def look(self) -> None:
        """Ask for every name once, all at the same time."""
        await asyncio.gather(*(self._look(table) for table in self._settings.dns))

    async def _look(self, table: DnsTable) -> None:
        try:
            engines = await self._ask(table)
        except self._nobody:
            engines = []
        except (self._trouble, OSError) as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            if table.name not in self._problems:
                _log.warning("discovery: %s could not be resolved, the last answer holds: %s", table.name, why)
            self._problems[table.name] = why
            return
        self._problems.pop(table.name, None)
        self._found(table.name, engines)

    async def _ask(self, table: DnsTable) -> list[EngineSpec]:
        answer = await self._resolver.resolve(table.name, table.record, lifetime=self._settings.timeout_ms / 1000)
        places = set()
        for record in answer:
            if table.record == "SRV":
                places.add((str(record.target).rstrip("."), int(record.port)))
            else:
                assert table.port is not None, "checked with the configuration"
                places.add((str(record.address), table.port))
        return [table.engine(host, port).spec() for host, port in sorted(places)]


def _server(text: str) -> Do53Nameserver:
    from dns.nameserver import Do53Nameserver

    host, _, port = text.rpartition(":") if text.count(":") == 1 or "]:" in text else (text, "", "")
    return Do53Nameserver(str(ip_address(host.strip("[]"))), int(port or _DNS_PORT))

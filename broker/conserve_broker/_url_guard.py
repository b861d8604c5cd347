"""Which URLs an engine may register with: whoever registers makes the broker, and every agent, call that URL."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import translate
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

_PATTERN = re.compile(r"^https?://[A-Za-z0-9.*\[\]:_-]+$")


class UrlGuard:
    """An allow-list of networks and URL patterns.

    A network allows URLs whose host *is* an address in it, on any port. A host name is never resolved here: what it
    means may change between this check and the call. Names are allowed by patterns alone, where `*` stands for any
    part of one host name or port.

    Raises:
        ValueError: an entry is neither; the message names it.
    """

    def __init__(self, allow: Sequence[str]) -> None:
        self._networks: list[IPv4Network | IPv6Network] = []
        self._patterns: list[re.Pattern[str]] = []
        for entry in allow:
            if "://" not in entry:
                self._networks.append(_network(entry))
            elif _PATTERN.match(entry):
                # `*` must not swallow "/" or "@": what comes after the host is compared apart.
                self._patterns.append(re.compile(translate(entry.lower()).replace(".*", "[a-z0-9._-]*")))
            else:
                raise ValueError(f"allow: {entry!r} is no pattern like 'http://*.workers.internal:8000'")

    @property
    def networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The networks of the list."""
        return tuple(self._networks)

    def allows(self, url: str) -> bool:
        """Whether an engine may have this (normalised) URL."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.path not in {"", "/"} or parts.username is not None:
            return False
        port = parts.port or (443 if parts.scheme == "https" else 80)
        name = f"[{host}]" if ":" in host else host
        spellings = {f"{parts.scheme}://{name}:{port}", f"{parts.scheme}://{parts.netloc}".lower()}
        if any(pattern.fullmatch(spelling) for pattern in self._patterns for spelling in spellings):
            return True
        try:
            address = ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in self._networks)


def _network(entry: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(entry)
    except ValueError as error:
        raise ValueError(
            f"allow: {entry!r} is neither a network like '10.0.0.0/8' nor a URL pattern like "
            f"'http://*.workers.internal:8000' ({error})"
        ) from None

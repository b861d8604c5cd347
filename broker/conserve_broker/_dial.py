"""Where the broker may connect to on the word of somebody else: an engine that registered under a host name.

The name was allowed by a pattern, but what it stands for is up to whoever answers for it, now and at the next look. So
it is resolved here, every address is looked at, and the connection goes to the address that was looked at: nothing can
change in between.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

__all__ = ["AddressForbiddenError", "AddressGuard", "Place"]

_METADATA = frozenset({ip_address("fd00:ec2::254"), ip_address("100.100.100.200")})
"""Where clouds keep credentials, besides 169.254.169.254, which is link-local."""


class AddressForbiddenError(Exception):
    """A name stands for an address that no engine may have; one line."""


class Place:
    """Where to send a request: the URL, and what makes the answerer believe that its name was used.

    Attributes:
        base: URL with an address in place of the name.
        host: for the `Host` header.
        sni: the name that its certificate must be for.
    """

    __slots__ = ("base", "host", "sni")

    def __init__(self, base: str, host: str, sni: str) -> None:
        self.base, self.host, self.sni = base, host, sni


class AddressGuard:
    """Says to which addresses names may lead.

    Args:
        networks: those of the allow-list. Every address in one of them is good; others are unless they are the
            broker's own machine, link-local (where clouds keep credentials), multicast or reserved.
    """

    def __init__(self, networks: Sequence[IPv4Network | IPv6Network]) -> None:
        self._networks = tuple(networks)

    async def place(self, url: str) -> Place:
        """Resolve a URL's host.

        Raises:
            AddressForbiddenError: it has no address, or one that is not allowed.
        """
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        address = await self._address(host, port)
        literal = f"[{address}]" if address.version == 6 else str(address)
        return Place(f"{parts.scheme}://{literal}:{port}", parts.netloc, host)

    async def _address(self, host: str, port: int) -> IPv4Address | IPv6Address:
        try:
            return ip_address(host)  # the allow-list spoke of this very address
        except ValueError:
            pass
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise AddressForbiddenError(f"{host} cannot be resolved ({error.strerror or error})") from error
        addresses = [ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        for address in addresses:
            if not self.allows(address):
                raise AddressForbiddenError(
                    f"{host} stands for {address}, which is no address for an engine; add a network to "
                    "[registration] allow if it is"
                )
        return addresses[0]

    def allows(self, address: IPv4Address | IPv6Address) -> bool:
        """Whether a name may stand for this address."""
        plain = getattr(address, "ipv4_mapped", None) or address
        if any(plain in network for network in self._networks):
            return True
        special = plain.is_loopback or plain.is_link_local or plain.is_multicast or plain.is_unspecified
        return not (special or plain.is_reserved or plain in _METADATA)

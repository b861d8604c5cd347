"""One TLS context for all connections of the process: building one costs about 80 ms."""

from __future__ import annotations

import functools
import ssl
from collections.abc import Iterable

import httpx2

__all__ = ["verify_for"]


@functools.cache
def _shared_context(ca_file: str, cert_file: str, key_file: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file) if ca_file else httpx2.create_ssl_context()
    if cert_file:
        context.load_cert_chain(cert_file, key_file)
    return context


def verify_for(
    urls: Iterable[str], *, ca_file: str = "", cert_file: str = "", key_file: str = ""
) -> ssl.SSLContext | bool:
    """Return what to pass as `verify=` to an httpx2 transport that will talk to these URLs.

    The shared context if any of them is https. Where all are plain http there is nothing to verify, and False saves
    building a context that would never be used.

    Args:
        urls: of the peers.
        ca_file: PEM file with the only authorities that count; "": those of the system.
        cert_file: this side's own certificate (PEM); "": none.
        key_file: its private key.

    Raises:
        OSError: a file cannot be read or used.
    """
    if not any(url.lower().startswith("https:") for url in urls):
        return False
    return _shared_context(ca_file, cert_file, key_file)

"""HTTP/1.1 to engines in the clear, in fewer steps than a general client needs (ADR 0033).

Between an agent and its engine nothing varies: one address, one kind of request that is in memory already, one answer
after the other. httpx2's transport is made for everything else too, and costs a millisecond of CPU per turn where the
caches are cold, which they are after the wait for an engine. This pair does what it does, with llhttp (`httptools`)
reading the answers and the operating system's own sockets or the event loop's own transports below. TLS, `HEAD` and
whatever else is rare stay with httpx2.
"""

from __future__ import annotations

from conserve_sdk._http1._blocking import Http1Transport
from conserve_sdk._http1._looped import AsyncHttp1Transport
from conserve_sdk._http1._request import is_plain

__all__ = ["AsyncHttp1Transport", "Http1Transport", "is_plain"]

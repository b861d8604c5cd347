"""What a flow asks its driver to do, and what it gets back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import httpx2

from conserve_sdk.core._quick import quick_init
from conserve_sdk.protocol import EngineList, LeaseGrant, LeaseRequest, SupersedeRequest

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquire:
    """Ask the broker for a lease; answered with a `LeaseGrant`."""

    request: LeaseRequest
    budget_ms: int
    trace: Mapping[str, str] = field(default_factory=dict)
    """Headers that let the broker join the turn's trace."""
    gone_ms: int | None = None
    """How long a broker is tried again that takes no connection; None: like one that is silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supersede:
    """Ask the broker for another decoder; answered with a `LeaseGrant`."""

    lease_id: str
    request: SupersedeRequest
    budget_ms: int
    trace: Mapping[str, str] = field(default_factory=dict)
    gone_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Park:
    """Tell the broker that the conversation waits for a human; answered with a `LeaseStatus`."""

    lease_id: str
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Give a lease back; answered with None."""

    lease_id: str
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListEngines:
    """Ask the broker which engines there are; answered with an `EngineList`."""

    budget_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Send a request to an engine and read its whole answer; answered with `Fetched`."""

    request: httpx2.Request


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Send a request to an engine and wait for the first bytes of its body; answered with `Opened`.

    Headers alone prove little: vLLM sends those of a stream before it has computed anything. Until the first bytes
    are there another decoder may still take over, unseen by the application.
    """

    request: httpx2.Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """Close an opened response unread; answered with None."""

    opened: Opened


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Wait for another turn's flight; answered with its grant, or None. Raises TimeoutError after `timeout_s`."""

    future: Future[LeaseGrant | None]
    timeout_s: float


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A whole answer.

    Attributes:
        arrived_us: an instant at which it had surely not arrived yet: the age of what it grants counts from here.
    """

    status: int
    body: bytes
    arrived_us: int


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A response whose first bytes have come.

    Attributes:
        response: as the engine transport gave it; its stream is being read through `rest`.
        first: the first bytes of the body; empty for an empty body.
        rest: iterator over what follows, of the colour of the driver.
    """

    response: httpx2.Response
    first: bytes
    rest: Iterator[bytes] | AsyncIterator[bytes]


Effect: TypeAlias = Acquire | Supersede | Park | Release | ListEngines | Fetch | Open | Discard | Wait
Flow: TypeAlias = Generator[Effect, Any, T]


def acquire(
    request: LeaseRequest, *, budget_ms: int, gone_ms: int | None, trace: Mapping[str, str]
) -> Flow[LeaseGrant]:
    """Typed form of `Acquire`."""
    grant = yield Acquire(request=request, budget_ms=budget_ms, gone_ms=gone_ms, trace=trace)
    assert isinstance(grant, LeaseGrant)
    return grant


def supersede(
    lease_id: str, request: SupersedeRequest, *, budget_ms: int, trace: Mapping[str, str], gone_ms: int | None = None
) -> Flow[LeaseGrant]:
    """Typed form of `Supersede`."""
    grant = yield Supersede(lease_id=lease_id, request=request, budget_ms=budget_ms, gone_ms=gone_ms, trace=trace)
    assert isinstance(grant, LeaseGrant)
    return grant


def list_engines(*, budget_ms: int) -> Flow[EngineList]:
    """Typed form of `ListEngines`."""
    engines = yield ListEngines(budget_ms=budget_ms)
    assert isinstance(engines, EngineList)
    return engines


def fetch(request: httpx2.Request) -> Flow[Fetched]:
    """Typed form of `Fetch`."""
    answer = yield Fetch(request=request)
    assert isinstance(answer, Fetched)
    return answer


def open_response(request: httpx2.Request) -> Flow[Opened]:
    """Typed form of `Open`."""
    opened = yield Open(request=request)
    assert isinstance(opened, Opened)
    return opened


def wait_for(future: Future[LeaseGrant | None], *, timeout_s: float) -> Flow[LeaseGrant | None]:
    """Typed form of `Wait`."""
    grant = yield Wait(future=future, timeout_s=timeout_s)
    assert grant is None or isinstance(grant, LeaseGrant)
    return grant

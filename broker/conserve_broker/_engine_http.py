"""What the broker asks an engine over HTTP, with bounded answers and failures that fit into one line."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from types import MappingProxyType

import httpx2

from conserve_broker._dial import AddressForbiddenError, AddressGuard
from conserve_broker.metrics_page import EngineMetrics, MetricsPageError, read_page
from conserve_sdk.protocol import LEASE_HEADER

_BODY_BYTES_MAX = 16 * 1024 * 1024
_DETAIL_CHARS_MAX = 200
PARSE_ELSEWHERE_BYTES = 256 * 1024
"""Pages from here on are worth a thread: parsing one would hold the event loop for over a millisecond."""


class EngineTrouble(Exception):  # noqa: N818  # a state of the engine, not a fault of the program
    """The engine does not answer as it should; `str()` is one line."""

    def __init__(self, detail: str) -> None:
        super().__init__(" ".join(detail.split())[:_DETAIL_CHARS_MAX])


@dataclass(frozen=True, slots=True)
class Door:
    """How an engine is asked.

    Attributes:
        key: its own API key; "" for none.
        guard: looks at where its name leads; None for engines that an operator named.
    """

    key: str = field(default="", repr=False)
    guard: AddressGuard | None = None


PLAIN = Door()


async def check_health(transport: httpx2.AsyncBaseTransport, url: str, door: Door = PLAIN) -> None:
    """Ask `/health`, behind which vLLM asks its engine core.

    Raises:
        EngineTrouble: it cannot be reached or is not healthy.
    """
    await _get(transport, url, "/health", door)


async def get_metrics(transport: httpx2.AsyncBaseTransport, url: str, door: Door = PLAIN) -> bytes:
    """The `/metrics` page.

    Raises:
        EngineTrouble: it cannot be reached or does not answer 200.
    """
    return await _get(transport, url, "/metrics", door)


async def get_models(transport: httpx2.AsyncBaseTransport, url: str, door: Door = PLAIN) -> Mapping[str, int]:
    """The models that `/v1/models` lists, each with its longest prompt plus output in tokens (0: not said).

    Raises:
        EngineTrouble: it cannot be reached or does not list models.
    """
    body = await _get(transport, url, "/v1/models", door)
    try:
        listed = json.loads(body)["data"]
        return {str(model["id"]): int(model.get("max_model_len") or 0) for model in listed}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise EngineTrouble("/v1/models does not list models; is this an OpenAI-compatible vLLM server?") from error


def parse(page: bytes) -> EngineMetrics:
    """`read_page` with its failure as an `EngineTrouble`."""
    try:
        return read_page(page)
    except MetricsPageError as error:
        raise EngineTrouble(str(error)) from error
    except (ValueError, OverflowError) as error:  # an absurd number must not end the watch over the other engines
        raise EngineTrouble(f"/metrics holds a number that cannot be one: {error}") from error


async def release_hold(transport: httpx2.AsyncBaseTransport, url: str, lease_token: str, door: Door = PLAIN) -> bool:
    """Ask the engine's guard to end the hold of the lease that the token is of.

    Returns:
        False if this engine's holds end by themselves only: it has no guard, or its holds belong to no leases.

    Raises:
        EngineTrouble: it cannot be reached, or does not end the hold for another reason.
    """
    path = "/conserve/release"
    headers = {LEASE_HEADER: lease_token}
    async with _answer(transport, url, path, door, method="POST", headers=headers) as response:
        if response.status_code == HTTPStatus.NO_CONTENT:
            return True
        if response.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            return False
        code = _error_code(await _bounded(response, path))
        if code == "holds_not_leased":
            return False
        raise EngineTrouble(f"{path} answered {response.status_code} {code}")


async def _get(transport: httpx2.AsyncBaseTransport, url: str, path: str, door: Door) -> bytes:
    """The body of a good answer."""
    async with _answer(transport, url, path, door) as response:
        if response.status_code != HTTPStatus.OK:
            raise EngineTrouble(f"{path} answered {response.status_code}")
        return await _bounded(response, path)


@asynccontextmanager
async def _answer(
    transport: httpx2.AsyncBaseTransport,
    url: str,
    path: str,
    door: Door,
    *,
    method: str = "GET",
    headers: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[httpx2.Response]:
    """An answer whose body is still to be read. No client round the transport: it was half of what a poll cost.

    A transport follows no redirect either: whoever answers must not send the broker, or its key, elsewhere.
    """
    sent = {**headers, "authorization": f"Bearer {door.key}"} if door.key else dict(headers)
    extensions = {}
    try:
        if door.guard is not None:
            place = await door.guard.place(url)
            url, sent["host"], extensions["sni_hostname"] = place.base, place.host, place.sni
        request = httpx2.Request(method, f"{url}{path}", headers=sent, extensions=extensions)
        response = await transport.handle_async_request(request)
        try:
            yield response
        finally:
            await response.aclose()
    except AddressForbiddenError as error:
        raise EngineTrouble(str(error)) from error
    except httpx2.HTTPError as error:
        raise EngineTrouble(f"{path}: {str(error) or type(error).__name__}") from error


def _error_code(body: bytes) -> str:
    """The code that an engine's error has, or ""."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


async def _bounded(response: httpx2.Response, path: str) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > _BODY_BYTES_MAX:
            raise EngineTrouble(f"{path} sent over {_BODY_BYTES_MAX} bytes")
    return bytes(body)

"""What the broker asks an engine over HTTP, with bounded answers and failures that fit into one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx2

from conserve_broker._dial import AddressForbiddenError, AddressGuard
from conserve_broker.metrics_page import EngineMetrics, MetricsPageError, read_page

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


async def _get(transport: httpx2.AsyncBaseTransport, url: str, path: str, door: Door) -> bytes:
    """The body of a good answer. No client round the transport: its other talents were half of what a poll cost.

    A transport follows no redirect either: whoever answers must not send the broker, or its key, elsewhere.
    """
    headers = {"authorization": f"Bearer {door.key}"} if door.key else {}
    extensions = {}
    try:
        if door.guard is not None:
            place = await door.guard.place(url)
            url, headers["host"], extensions["sni_hostname"] = place.base, place.host, place.sni
        request = httpx2.Request("GET", f"{url}{path}", headers=headers, extensions=extensions)
        response = await transport.handle_async_request(request)
        try:
            if response.status_code != httpx2.codes.OK:
                raise EngineTrouble(f"{path} answered {response.status_code}")
            return await _bounded(response, path)
        finally:
            await response.aclose()
    except AddressForbiddenError as error:
        raise EngineTrouble(str(error)) from error
    except httpx2.HTTPError as error:
        raise EngineTrouble(f"{path}: {str(error) or type(error).__name__}") from error


async def _bounded(response: httpx2.Response, path: str) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > _BODY_BYTES_MAX:
            raise EngineTrouble(f"{path} sent over {_BODY_BYTES_MAX} bytes")
    return bytes(body)

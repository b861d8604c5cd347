"""What the engines themselves counted: the few figures of `/metrics` that say who prefilled and what was moved.

The names are vLLM's (0.32), so that the same audit reads emulated engines and real ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from conserve_lab.demo.plain_http import plain_async_client

_LINE = re.compile(r"^(?P<name>[a-zA-Z_:]+)(?:\{(?P<labels>.*)\})? (?P<value>[^ ]+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounters:
    """Counters of one engine, or the sum over several.

    Attributes:
        requests: finished requests, prefill legs included.
        prompt_tokens: prompt tokens of all requests.
        computed_tokens: prompt tokens computed here.
        cached_tokens: prompt tokens found in the engine's own prefix cache.
        received_tokens: prompt tokens whose KV came from another engine.
        transfers: KV transfers read by this engine.
        failed_transfers: KV transfers that failed.
        external_hit_tokens: prompt tokens that the connector offered from another engine.
        generated_tokens: tokens generated.
    """

    requests: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    received_tokens: int = 0
    transfers: int = 0
    failed_transfers: int = 0
    external_hit_tokens: int = 0
    generated_tokens: int = 0

    def __add__(self, other: EngineCounters) -> EngineCounters:
        """Add counter by counter."""
        return EngineCounters(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: EngineCounters) -> EngineCounters:
        """Return what was counted since `other`."""
        return EngineCounters(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})


_SOURCES: dict[str, tuple[str, str]] = {
    "requests": ("vllm:request_success_total", ""),
    "prompt_tokens": ("vllm:prompt_tokens_total", ""),
    "computed_tokens": ("vllm:prompt_tokens_by_source_total", 'source="local_compute"'),
    "cached_tokens": ("vllm:prompt_tokens_by_source_total", 'source="local_cache_hit"'),
    "received_tokens": ("vllm:prompt_tokens_by_source_total", 'source="external_kv_transfer"'),
    "transfers": ("vllm:nixl_xfer_time_seconds_count", ""),
    "failed_transfers": ("vllm:nixl_num_failed_transfers_total", ""),
    "external_hit_tokens": ("vllm:external_prefix_cache_hits_total", ""),
    "generated_tokens": ("vllm:generation_tokens_total", ""),
}


def parse_counters(page: str) -> EngineCounters:
    """Read the counters out of a `/metrics` page; one that is missing counts as 0."""
    sums = dict.fromkeys(_SOURCES, 0.0)
    wanted = {name for name, _ in _SOURCES.values()}
    for line in page.splitlines():
        match = _LINE.match(line)
        if match is None or match["name"] not in wanted:
            continue
        for counter, (name, label) in _SOURCES.items():
            if name == match["name"] and label in (match["labels"] or ""):
                sums[counter] += float(match["value"])
    return EngineCounters(**{counter: round(value) for counter, value in sums.items()})


async def read_counters(urls: Mapping[str, str]) -> dict[str, EngineCounters]:
    """Ask every engine for its counters.

    Args:
        urls: base URL by engine id.

    Raises:
        httpx2.HTTPError: an engine did not answer.
    """
    async with plain_async_client(10) as client:
        pages = {engine_id: await client.get(f"{url}/metrics") for engine_id, url in urls.items()}
    return {engine_id: parse_counters(page.raise_for_status().text) for engine_id, page in pages.items()}


def total(counters: Iterable[EngineCounters]) -> EngineCounters:
    """Add the counters of several engines."""
    return sum(counters, EngineCounters())

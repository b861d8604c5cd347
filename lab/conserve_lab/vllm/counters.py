"""vLLM's own counters, read from its `/metrics` page: the witness that does not depend on any of our code.

Only the lines that are wanted are parsed (a page has some 750). Names and meanings as of vLLM 0.32
(`vllm/v1/metrics/loggers.py`, `vllm/distributed/kv_transfer/kv_connector/v1/nixl/stats.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["EngineCounters", "parse_counters"]

LINE = re.compile(r"^vllm:(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
LABEL = re.compile(r'(\w+)="([^"]*)"')
GAUGES = frozenset({"kv_used_tokens", "running", "waiting"})

PLAIN = {
    "prompt_tokens_total": "prompt_tokens",
    "generation_tokens_total": "generation_tokens",
    "prefix_cache_queries_total": "prefix_query_tokens",
    "prefix_cache_hits_total": "prefix_hit_tokens",
    "external_prefix_cache_queries_total": "external_query_tokens",
    "external_prefix_cache_hits_total": "external_hit_tokens",
    "request_success_total": "requests",
    "num_preemptions_total": "preemptions",
    "nixl_xfer_time_seconds_count": "transfers",
    "nixl_bytes_transferred_sum": "transferred_bytes",
    "nixl_num_failed_transfers_total": "failed_transfers",
    "nixl_num_kv_expired_reqs_total": "expired_holds",
    "num_requests_running": "running",
    "num_requests_waiting": "waiting",
}
BY_SOURCE = {
    "local_compute": "prompt_computed_tokens",
    "local_cache_hit": "prompt_cached_tokens",
    "external_kv_transfer": "prompt_transferred_tokens",
}
CONFIG = "cache_config_info"
USAGE = "kv_cache_usage_perc"
SOURCES = "prompt_tokens_by_source_total"


@dataclass(frozen=True, kw_only=True)
class EngineCounters:
    """What one engine has counted since it started.

    Attributes:
        prompt_tokens: Prompt tokens of all requests.
        prompt_computed_tokens: Those it computed itself.
        prompt_cached_tokens: Those it found in its own prefix cache.
        prompt_transferred_tokens: Those that came from another engine.
        generation_tokens: Tokens it generated.
        prefix_query_tokens: Prompt tokens looked up in its prefix cache.
        prefix_hit_tokens: Those found there.
        external_query_tokens: Prompt tokens that another engine was asked for.
        external_hit_tokens: Those that it had. Counted as hits even if the transfer then fails.
        requests: Requests that ended.
        preemptions: Requests pushed out for want of KV blocks.
        transfers: KV reads from another engine, counted by the reader.
        transferred_bytes: What they moved.
        failed_transfers: KV reads that failed.
        expired_holds: Requests whose held blocks nobody fetched in time (a decoder's holds all end that way).
        kv_used_tokens: KV in use or held right now.
        running: Requests in the batch right now.
        waiting: Requests in the queue right now.
        kv_capacity_tokens: Size of the KV cache.
        block_size_tokens: Size of a block.
    """

    prompt_tokens: int = 0
    prompt_computed_tokens: int = 0
    prompt_cached_tokens: int = 0
    prompt_transferred_tokens: int = 0
    generation_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    external_query_tokens: int = 0
    external_hit_tokens: int = 0
    requests: int = 0
    preemptions: int = 0
    transfers: int = 0
    transferred_bytes: int = 0
    failed_transfers: int = 0
    expired_holds: int = 0
    kv_used_tokens: int = 0
    running: int = 0
    waiting: int = 0
    kv_capacity_tokens: int = 0
    block_size_tokens: int = 0

    def since(self, before: EngineCounters) -> EngineCounters:
        """What was counted between two readings.

        Args:
            before: The earlier reading of the same engine, without a restart in between.

        Returns:
            Differences; sizes and what is in use right now stay as they are in this reading.
        """
        kept = GAUGES | {"kv_capacity_tokens", "block_size_tokens"}
        changed = {
            field.name: getattr(self, field.name) - getattr(before, field.name)
            for field in dataclasses.fields(self)
            if field.name not in kept
        }
        return dataclasses.replace(self, **changed)

    def __add__(self, other: EngineCounters) -> EngineCounters:
        """The sum over two engines (of capacities too; the block size is the larger one)."""
        total = {
            field.name: getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)
        }
        return EngineCounters(**(total | {"block_size_tokens": max(self.block_size_tokens, other.block_size_tokens)}))


def parse_counters(page: str) -> EngineCounters:
    """Read the counters off a `/metrics` page.

    Args:
        page: The page's text.

    Returns:
        The counters, 0 where the page has none (an engine without a connector has no transfers).
    """
    sums: dict[str, float] = {}
    config: dict[str, str] = {}
    usage = 0.0
    for name, labels, value in _samples(page.splitlines()):
        if name == CONFIG:
            config = labels
        elif name == USAGE:
            usage = value
        elif field := BY_SOURCE.get(labels.get("source", "")) if name == SOURCES else PLAIN.get(name):
            sums[field] = sums.get(field, 0.0) + value
    blocks = int(config.get("num_gpu_blocks", "0"))
    block = int(config.get("block_size", "0"))
    return EngineCounters(
        **{field: round(value) for field, value in sums.items()},
        block_size_tokens=block,
        kv_capacity_tokens=blocks * block,
        # vLLM's denominator leaves out the null block.
        kv_used_tokens=round(usage * max(0, blocks - 1)) * block,
    )


def _samples(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, str], float]]:
    for line in lines:
        if (match := LINE.match(line)) and _is_wanted(match["name"]):
            yield match["name"], dict(LABEL.findall(match["labels"] or "")), float(match["value"])


def _is_wanted(name: str) -> bool:
    return name in PLAIN or name in {CONFIG, USAGE, SOURCES}

"""vLLM's `/metrics` page, read for the few numbers that placement needs.

A line filter on bytes: a page of eight data-parallel engines (1500 lines) costs about 1 ms, where a general parser
takes 40 ms; sixty pages a second have to fit beside everything else. Names as of vLLM 0.32 (`vllm/v1/metrics/
loggers.py`, `vllm/distributed/kv_transfer/kv_connector/v1/nixl/stats.py`).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from conserve_sdk.core.units import Tokens

__all__ = ["EngineMetrics", "MetricsPageError", "read_page"]

_CONFIG = b"vllm:cache_config_info"
_USAGE = b"vllm:kv_cache_usage_perc"
_USAGE_BEFORE_0_11 = b"vllm:gpu_cache_usage_perc"
_RUNNING = b"vllm:num_requests_running"
_WAITING = b"vllm:num_requests_waiting"
_PROMPT_BY_SOURCE = b"vllm:prompt_tokens_by_source_total"
_PROMPT = b"vllm:prompt_tokens_total"
_GENERATED = b"vllm:generation_tokens_total"
_STARTED = b"process_start_time_seconds"
_WANTED = frozenset(
    {_CONFIG, _USAGE, _USAGE_BEFORE_0_11, _RUNNING, _WAITING, _PROMPT_BY_SOURCE, _PROMPT, _GENERATED, _STARTED}
)
_CONNECTOR_PREFIX = b"vllm:nixl_"
_LABEL = re.compile(rb'([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"')

_Labels = dict[bytes, bytes]


class MetricsPageError(ValueError):
    """The page is not what a vLLM server serves; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMetrics:
    """One page, summed over the data-parallel engines (`engine` label) of the server.

    Attributes:
        kv_capacity_tokens: tokens its KV cache holds; 0 when the page does not say.
        kv_used_tokens: tokens in use, from the usage ratio.
        block_size_tokens: 0 when the page does not say or the engines differ.
        prefill_tokens_total: prompt tokens computed by the server itself.
        transferred_tokens_total: prompt tokens that came over the KV connector.
        work_tokens_total: prompt and generated tokens; goes backwards only over a restart.
        started_at_s: `process_start_time_seconds`; None where the server runs its metrics in multiprocess mode
            (`--api-server-count` above 1), which leaves it out.
        prefix_caching: None when the page does not say.
        nixl: whether a NIXL connector is loaded; its series exist from the start.
    """

    kv_capacity_tokens: Tokens
    kv_used_tokens: Tokens
    block_size_tokens: Tokens
    running: int
    waiting: int
    prefill_tokens_total: Tokens
    transferred_tokens_total: Tokens
    work_tokens_total: Tokens
    started_at_s: float | None
    prefix_caching: bool | None
    nixl: bool


def read_page(page: bytes) -> EngineMetrics:
    """Read a page in Prometheus' text format.

    Raises:
        MetricsPageError: it holds no series of a vLLM server.
    """
    series, nixl = _select(page)
    if _RUNNING not in series:
        raise MetricsPageError("/metrics has no vllm:num_requests_running; is this a vLLM server with metrics on?")
    capacities, block_sizes, prefix_caching = _cache_configs(series[_CONFIG])
    capacity = sum(capacities.values())
    by_source: dict[bytes, float] = defaultdict(float)
    for labels, value in series[_PROMPT_BY_SOURCE]:
        by_source[labels.get(b"source", b"")] += value
    started = [value for _, value in series[_STARTED]]
    return EngineMetrics(
        kv_capacity_tokens=Tokens(capacity),
        kv_used_tokens=Tokens(_used(series[_USAGE] or series[_USAGE_BEFORE_0_11], capacities, capacity)),
        block_size_tokens=Tokens(block_sizes.pop() if len(block_sizes) == 1 else 0),
        running=_total(series[_RUNNING]),
        waiting=_total(series[_WAITING]),
        prefill_tokens_total=Tokens(round(by_source[b"local_compute"])),
        transferred_tokens_total=Tokens(round(by_source[b"external_kv_transfer"])),
        work_tokens_total=Tokens(_total(series[_PROMPT]) + _total(series[_GENERATED])),
        started_at_s=max(started) if started else None,
        prefix_caching=prefix_caching,
        nixl=nixl,
    )


def _select(page: bytes) -> tuple[dict[bytes, list[tuple[_Labels, float]]], bool]:
    """The wanted series with labels and value; and whether a connector's series are there."""
    series: dict[bytes, list[tuple[_Labels, float]]] = defaultdict(list)
    nixl = False
    for line in page.split(b"\n"):
        name = line.partition(b"{")[0].partition(b" ")[0]
        if name in _WANTED:
            body, _, tail = line[len(name) :].rpartition(b"}")
            series[name].append((dict(_LABEL.findall(body)), _number(tail)))
        elif not nixl and name.startswith(_CONNECTOR_PREFIX):
            nixl = True
    return series, nixl


def _number(tail: bytes) -> float:
    """The value that follows the labels, perhaps before a timestamp; what is no finite number counts as 0."""
    try:
        value = float(tail.split(maxsplit=1)[0])
    except (ValueError, IndexError) as error:
        raise MetricsPageError(f"/metrics holds a line that ends in {tail[:40]!r} instead of a number") from error
    return value if math.isfinite(value) else 0.0


def _cache_configs(infos: list[tuple[_Labels, float]]) -> tuple[dict[bytes, int], set[int], bool | None]:
    """Capacity per data-parallel engine, the block sizes, and whether all of them cache prefixes.

    Each engine has its own capacity; vLLM does not sum them (`vllm/v1/engine/core_client.py`).
    """
    capacities: dict[bytes, int] = {}
    block_sizes: set[int] = set()
    prefix_caching: bool | None = None
    for labels, _ in infos:
        block_size = _whole(labels.get(b"block_size"))
        blocks = _whole(labels.get(b"num_gpu_blocks"))
        capacities[labels.get(b"engine", b"")] = _whole(labels.get(b"kv_cache_size_tokens")) or blocks * block_size
        if block_size:
            block_sizes.add(block_size)
        if b"enable_prefix_caching" in labels:
            prefix_caching = labels[b"enable_prefix_caching"] == b"True" and prefix_caching is not False
    return capacities, block_sizes, prefix_caching


def _whole(label: bytes | None) -> int:
    """A label that should be a whole number; 0 for `None`, as vLLM writes what it does not know yet."""
    return int(label) if label is not None and label.isdigit() else 0


def _used(usages: list[tuple[_Labels, float]], capacities: dict[bytes, int], capacity: int) -> int:
    """Tokens in use: each engine's ratio times its own capacity, or an equal share where the labels do not match."""
    if not usages:
        return 0
    share = capacity / len(usages)
    return round(sum(ratio * capacities.get(labels.get(b"engine", b""), share) for labels, ratio in usages))


def _total(values: list[tuple[_Labels, float]]) -> int:
    return round(sum(value for _, value in values))

"""`conserve broker check-config`: the merged configuration, and with `--probe` whether the engines fit it."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from conserve_broker import _engine_http
from conserve_broker._engine_http import Door, EngineTrouble
from conserve_broker.journal import JournalError
from conserve_broker.metrics_page import EngineMetrics
from conserve_broker.redis_store import RedisStore
from conserve_broker.settings import BrokerConfig, ConfigProblem, EngineTable, load_config
from conserve_broker.tls import ServerTls
from conserve_sdk.core.units import EngineId

__all__ = ["EngineFinding", "Report", "check_config"]

_OK, _WRONG = 0, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFinding:
    """What a probe found out about one engine.

    Attributes:
        summary: what it serves, or why it could not be asked.
        misfits: where it contradicts the configuration; each says what to do.
        notes: what is worth knowing but no contradiction.
    """

    engine_id: str
    summary: str
    misfits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of a check.

    Attributes:
        config: the merged configuration; None when it cannot be used.
        errors: why it cannot be used.
        warnings: what works, but probably not as meant.
        engines: one finding per engine when they were probed.
    """

    path: str
    config: BrokerConfig | None
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    engines: tuple[EngineFinding, ...]

    @property
    def exit_code(self) -> int:
        """0 when a broker can start with it (and every probed engine fits), else 2."""
        return _WRONG if self.errors or any(engine.misfits for engine in self.engines) else _OK

    def text(self) -> str:
        """All of it for a terminal; secrets are hidden."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.config is not None:
            yield from _as_toml(self.config.printable())
        for error in self.errors:
            yield f"error: {error}"
        for warning in self.warnings:
            yield f"warning: {warning}"
        for engine in self.engines:
            yield f"{'MISFIT' if engine.misfits else 'ok':6} {engine.engine_id}: {engine.summary}"
            yield from (f"       {engine.engine_id}: {line}" for line in engine.misfits)
            yield from (f"       {engine.engine_id}: note: {line}" for line in engine.notes)
        yield f"{self.path}: {'ok' if self.exit_code == _OK else 'not usable as it is'}"


def check_config(
    path: str | Path,
    *,
    probe: bool = False,
    overrides: Mapping[str, Any] | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> Report:
    """Read a configuration as the broker would, and ask the engines when `probe` is set.

    Nothing is written, not even a default signing key. `transport` replaces the network (tests).
    """
    try:
        config = load_config(path, overrides=overrides)
        config.token_keys(create=False)
        config.api_keys()
        config.engine_keys()
        if config.tls.enabled:
            ServerTls(config.tls)
    except ConfigProblem as problem:
        return Report(path=str(path), config=None, errors=problem.problems, warnings=(), engines=())
    findings = asyncio.run(_probe(config, transport)) if probe else ()
    errors, doubts = _probe_store(config) if probe else ((), ())
    warnings = config.warnings() + doubts
    return Report(path=str(path), config=config, errors=errors, warnings=warnings, engines=findings)


def _probe_store(config: BrokerConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is wrong with the store that replicas share, and what may be."""
    if config.store.kind != "redis":
        return (), ()
    try:
        with closing(RedisStore(config.store)) as store:
            return (), store.doubts()
    except JournalError as error:
        return (str(error),), ()
    except ConfigProblem as problem:
        return problem.problems, ()


@dataclass(frozen=True, slots=True)
class _Answers:
    metrics: EngineMetrics
    models: Mapping[str, int]


async def _probe(config: BrokerConfig, transport: httpx2.AsyncBaseTransport | None) -> tuple[EngineFinding, ...]:
    timeout_s, keys = config.scrape.timeout_ms / 1000, config.engine_keys().of_file
    async with transport or httpx2.AsyncHTTPTransport(trust_env=False) as connections:
        answers = await asyncio.gather(
            *(_ask(connections, engine.url, timeout_s, Door(keys[EngineId(engine.id)])) for engine in config.engine)
        )
    sizes = _group_block_sizes(config.engine, answers)
    return tuple(_finding(engine, answer, sizes) for engine, answer in zip(config.engine, answers, strict=True))


async def _ask(transport: httpx2.AsyncBaseTransport, url: str, timeout_s: float, door: Door) -> _Answers | str:
    try:
        async with asyncio.timeout(timeout_s):
            await _engine_http.check_health(transport, url, door)
            page = await _engine_http.get_metrics(transport, url, door)
            return _Answers(_engine_http.parse(page), await _engine_http.get_models(transport, url, door))
    except EngineTrouble as trouble:
        return str(trouble)
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"


def _group_block_sizes(engines: Sequence[EngineTable], answers: Sequence[_Answers | str]) -> Mapping[str, set[int]]:
    sizes: dict[str, set[int]] = defaultdict(set)
    for engine, answer in zip(engines, answers, strict=True):
        if not isinstance(answer, str) and engine.transfer_group and answer.metrics.block_size_tokens:
            sizes[engine.transfer_group].add(answer.metrics.block_size_tokens)
    return sizes


def _finding(engine: EngineTable, answer: _Answers | str, sizes: Mapping[str, set[int]]) -> EngineFinding:
    if isinstance(answer, str):
        return EngineFinding(
            engine_id=engine.id,
            summary=f"cannot be asked at {engine.url}",
            misfits=(f"{answer}; start it or correct url",),
        )
    metrics = answer.metrics
    summary = (
        f"{', '.join(answer.models) or 'no model'}; KV {metrics.kv_capacity_tokens} tokens in blocks of "
        f"{metrics.block_size_tokens}; {metrics.running} running, {metrics.waiting} waiting"
    )
    return EngineFinding(
        engine_id=engine.id,
        summary=summary,
        misfits=tuple(_misfits(engine, answer, sizes)),
        notes=tuple(_notes(engine, metrics)),
    )


def _misfits(engine: EngineTable, answer: _Answers, sizes: Mapping[str, set[int]]) -> Iterator[str]:
    metrics, models = answer.metrics, answer.models
    if engine.model not in models:
        yield f"does not serve {engine.model!r}; set model to one of: {', '.join(models) or '(it lists none)'}"
    elif 0 < models[engine.model] < engine.max_model_len_tokens:
        yield f"max_model_len_tokens: {engine.max_model_len_tokens} is above what it serves ({models[engine.model]})"
    if not metrics.kv_capacity_tokens and not engine.kv_capacity_tokens:
        yield "its metrics have no vllm:cache_config_info with a capacity; set kv_capacity_tokens"
    if engine.block_size_tokens and metrics.block_size_tokens not in {0, engine.block_size_tokens}:
        yield f"block_size_tokens: {engine.block_size_tokens} is configured, {metrics.block_size_tokens} is served"
    if len(sizes.get(engine.transfer_group, ())) > 1:
        found = ", ".join(map(str, sorted(sizes[engine.transfer_group])))
        yield (
            f"transfer_group {engine.transfer_group!r} mixes block sizes ({found}); start its engines with one "
            "--block-size"
        )
    if metrics.prefix_caching is False:
        yield "prefix caching is off, so every turn computes the whole history; start it with --enable-prefix-caching"
    if engine.connector == "nixl" and not metrics.nixl:
        yield (
            "has no NIXL connector (no vllm:nixl_ series), so it moves no KV; start it with --kv-transfer-config or "
            "set connector = 'none'"
        )


def _notes(engine: EngineTable, metrics: EngineMetrics) -> Iterator[str]:
    if engine.connector == "none" and metrics.nixl:
        yield "has a NIXL connector that the configuration leaves unused (connector = 'none')"
    if metrics.started_at_s is None:
        yield "its metrics have no process_start_time_seconds, so a restart is only seen when its counters go backwards"


def _as_toml(data: Mapping[str, Any]) -> Iterator[str]:
    """Plain data as TOML; JSON's strings, numbers and flat lists are TOML's."""
    for name, table in data.items():
        tables = table if isinstance(table, list) else [table]
        for one in tables:
            yield f"[[{name}]]" if isinstance(table, list) else f"[{name}]"
            for key, value in one.items():
                shown = [_inline(item) for item in value] if isinstance(value, list) else [_inline(value)]
                yield f"{key} = [{', '.join(shown)}]" if isinstance(value, list) else f"{key} = {shown[0]}"
            yield ""


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_inline(item)}' for key, item in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)

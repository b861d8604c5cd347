"""What an emulated fleet looks like: engines, sizes, speeds, and the TOML file that says so."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from conserve_lab.emulator.language import LanguageSettings
from conserve_lab.engine_model import EngineModelConfig, StepCost, TransferCost

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
_INSTANT_TOKENS_PER_S = 10**15


class FleetConfigError(Exception):
    """A fleet configuration that cannot be used; the text names each key and what to do."""


class EmulatorConfig(BaseModel):
    """One emulated engine. Sizes use vLLM's names; speeds are in wall-clock units before `time_scale`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    role: Literal["prefiller", "decoder", "both"] = "both"
    """Only a label: any engine answers any request, as vLLM does."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 takes a free port, which the engine keeps over restarts."""
    model: Annotated[str, Field(min_length=1)] = "emulated"
    max_model_len: Positive = 32_768
    image_tokens: NotNegative = 0
    """Prompt tokens that an image becomes; 0 is a model for text alone, which refuses images."""

    block_size: Positive = 16
    kv_cache_tokens: Positive = 65_536
    max_num_seqs: Positive = 64
    max_num_batched_tokens: Positive = 2_048
    long_prefill_token_threshold: NotNegative = 0

    connector: Literal["nixl", "none"] = "nixl"
    """`none` is a vLLM without a KV connector: it ignores `kv_transfer_params`."""
    kv_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """NIXL side channel port as told in `remote_port`; 0 numbers the engines from 5600."""
    kv_lease_ms: Positive = 30_000
    leased_holds: bool = False
    """The connector knows whose a hold is, as `conserve_vllm.leased_nixl` does; orders come through a `LeaseGuard`."""
    kv_load_failure_policy: Literal["fail", "recompute"] = "recompute"
    """vLLM's own default is `fail`; `recompute` is what decoders should run with."""
    handshake_timeout_ms: NotNegative = 5_000
    """How long an engine waits for a dead peer it has not met before."""

    step_base_us: NotNegative = 18_000
    decode_us_per_sequence: NotNegative = 100
    decode_ns_per_context_token: NotNegative = 30
    prefill_tokens_per_s: Positive = 20_000
    kv_bytes_per_token: Positive = 131_072
    transfer_mb_per_s: Positive = 25_000
    transfer_overhead_us: NotNegative = 5_000
    time_scale: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Multiplies every duration above; 0 answers as fast as the machine can. Leases are not scaled."""

    stream_interval: Positive = 1
    """Tokens per streamed chunk after the first (vLLM's `--stream-interval`)."""
    tool_calls_min: NotNegative = 2
    tool_calls_max: NotNegative = 11
    answer_tokens_min: NotNegative = 20
    answer_tokens_max: NotNegative = 60

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kv_cache_tokens < self.max_model_len:
            raise ValueError(
                f"kv_cache_tokens ({self.kv_cache_tokens}) must hold one request of max_model_len "
                f"({self.max_model_len}); raise kv_cache_tokens or lower max_model_len"
            )
        for name in ("tool_calls", "answer_tokens"):
            if getattr(self, f"{name}_min") > getattr(self, f"{name}_max"):
                raise ValueError(f"{name}_min is larger than {name}_max; swap them")
        return self

    def engine_model(self) -> EngineModelConfig:
        """Return the sizes and speeds for the pure model, time scale applied."""
        return EngineModelConfig(
            block_size=self.block_size,
            kv_blocks=-(-self.kv_cache_tokens // self.block_size),
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            kv_lease_us=self.kv_lease_ms * 1000,
            cost=StepCost(
                base_us=self._scaled(self.step_base_us),
                decode_us_per_sequence=self._scaled(self.decode_us_per_sequence),
                decode_ns_per_context_token=self._scaled(self.decode_ns_per_context_token),
                prefill_tokens_per_s=self._per_second(self.prefill_tokens_per_s),
            ),
        )

    def transfer_cost(self) -> TransferCost:
        """Return what moving KV out of this engine takes, time scale applied."""
        return TransferCost(
            kv_bytes_per_token=self.kv_bytes_per_token,
            bytes_per_s=self._per_second(self.transfer_mb_per_s * 1_000_000),
            overhead_us=self._scaled(self.transfer_overhead_us),
        )

    def language(self) -> LanguageSettings:
        """Return how much the model says."""
        return LanguageSettings(
            tool_calls_min=self.tool_calls_min,
            tool_calls_max=self.tool_calls_max,
            answer_tokens_min=self.answer_tokens_min,
            answer_tokens_max=self.answer_tokens_max,
        )

    def _scaled(self, duration: int) -> int:
        return round(duration * self.time_scale)

    def _per_second(self, rate: int) -> int:
        return max(1, round(rate / self.time_scale)) if self.time_scale else rate * _INSTANT_TOKENS_PER_S


class FleetConfig(BaseModel):
    """The engines of one emulated fleet."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: Annotated[tuple[EmulatorConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for key, unset in (("id", None), ("port", 0), ("kv_port", 0)):
            seen: set[object] = set()
            for engine in self.engine:
                value = getattr(engine, key)
                if value in seen and value != unset:
                    raise ValueError(f"{key} {value!r} is used by two engines; give each its own")
                seen.add(value)
        return self

    def with_all(self, **changes: Any) -> FleetConfig:
        """Return the fleet with the same changes made to every engine.

        Raises:
            FleetConfigError: A change is not a valid setting.
        """
        return fleet_of([engine.model_dump() | changes for engine in self.engine])


def fleet_of(engines: Sequence[Mapping[str, Any]], *, defaults: Mapping[str, Any] | None = None) -> FleetConfig:
    """Return a fleet from plain dictionaries, one an engine; `defaults` hold for engines that do not say.

    Raises:
        FleetConfigError: Naming each wrong key and the remedy.
    """
    return _validated({"engine": [dict(defaults or {}) | dict(engine) for engine in engines]}, source="fleet")


def default_fleet(*, prefillers: int = 2, decoders: int = 3, **settings: Any) -> FleetConfig:
    """Return the usual fleet: prefillers `p0`, `p1`, decoders `d0`, `d1`, `d2`, all with the same settings."""
    engines = [{"id": f"p{index}", "role": "prefiller"} for index in range(prefillers)]
    engines += [{"id": f"d{index}", "role": "decoder"} for index in range(decoders)]
    return fleet_of(engines, defaults=settings)


def load_fleet_config(path: Path) -> FleetConfig:
    """Read a fleet file: `[[engine]]` tables and an optional `[defaults]` table for all of them.

    Raises:
        FleetConfigError: The file cannot be read or says something impossible.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FleetConfigError(f"{path}: {error.strerror}; name an existing TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise FleetConfigError(f"{path}: not valid TOML: {error}") from error
    defaults = document.pop("defaults", {})
    engines = document.pop("engine", [])
    if document:
        unknown = ", ".join(sorted(document))
        raise FleetConfigError(f"{path}: unknown key {unknown}; use [defaults] and [[engine]]")
    if not isinstance(defaults, dict) or not isinstance(engines, list):
        raise FleetConfigError(f"{path}: [defaults] is one table and [[engine]] a list of tables")
    merged = [defaults | engine if isinstance(engine, dict) else engine for engine in engines]
    return _validated({"engine": merged}, source=str(path))


def _validated(document: Mapping[str, Any], *, source: str) -> FleetConfig:
    try:
        return FleetConfig.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(_one_line(problem) for problem in error.errors(include_url=False))
        raise FleetConfigError(f"{source}: {problems}") from error


def _one_line(problem: Mapping[str, Any]) -> str:
    where = ""
    for part in problem["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = f"unknown key; known keys are {', '.join(sorted(EmulatorConfig.model_fields))}"
    elif problem["type"] == "too_short":
        message = "no engines; add at least one [[engine]] table"
    elif problem["type"] == "missing":
        message = "missing; add this key"
    return f"{where}: {message}" if where else message

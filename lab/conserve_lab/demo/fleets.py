"""The engines of a run, emulated or real, as the demo sees them: ids, URLs, roles and entries for the broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from conserve_lab.demo.errors import DemoError
from conserve_lab.demo.figures import Variant
from conserve_lab.demo.fleet_process import FleetProcess, FleetProcessError
from conserve_lab.demo.plain_http import plain_client
from conserve_lab.demo.settings import DemoSettings, EngineKind
from conserve_lab.emulator import FleetConfig, fleet_of
from conserve_lab.vllm import FleetOptions, VllmError, VllmFleet
from conserve_sdk.core.units import EngineId

Say = Callable[[str], None]

FINE: Mapping[str, Any] = {"max_num_batched_tokens": 768, "long_prefill_token_threshold": 384}
"""What docs/placement.md recommends for the presets `default` and `affinity`."""
PREFILLER: Mapping[str, Any] = {"role": "prefiller", "max_num_batched_tokens": 8_192}
DECODER: Mapping[str, Any] = {"role": "decoder", "max_num_batched_tokens": 512}
BOTH: Mapping[str, Any] = {"role": "both", **FINE}
"""Chunk sizes by role, those that serve the runs best: first turns of one size do not wait behind each other."""

PREFILLERS, DECODERS = 2, 3
_TOKENIZE_BUDGET_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningFleet:
    """Engines that are up.

    Attributes:
        model: name to ask for.
        urls: base URL by engine id.
        broker_engines: entries for the broker's `engine` table.
        call_bias: `logit_bias` of tool calls, for a random model that would not end them; None: it needs none.
    """

    kind: EngineKind
    model: str
    urls: Mapping[str, str]
    broker_engines: tuple[Mapping[str, Any], ...]
    call_bias: Mapping[str, int] | None = None

    @property
    def prefiller_ids(self) -> frozenset[str]:
        """Engines that only prefill."""
        return frozenset(str(entry["id"]) for entry in self.broker_engines if entry["role"] == "prefiller")

    @property
    def description(self) -> str:
        """How many engines of which role."""
        prefillers = len(self.prefiller_ids)
        others = len(self.broker_engines) - prefillers
        return f"{prefillers} prefill, {others} decode" if prefillers else f"{others} do both"


class FleetSource(Protocol):
    """Gives every run engines with cold caches."""

    def fresh(self, variant: Variant) -> AbstractContextManager[RunningFleet]:
        """Return engines for a run; as many for each variant."""
        ...

    @property
    def reference_url(self) -> str | None:
        """An aggregated server to compare answers with, or None."""
        ...


@contextmanager
def open_source(settings: DemoSettings, *, say: Say) -> Iterator[FleetSource]:
    """Open what the settings ask for.

    Raises:
        DemoError: real engines cannot be started.
    """
    if settings.engine == "emulated":
        with EmulatedSource(time_scale=settings.time_scale) as emulated:
            yield emulated
        return
    options = FleetOptions(prefillers=1, decoders=2, references=1)
    try:
        with VllmFleet(options, venv=settings.vllm_venv, say=say) as fleet:
            yield VllmSource(fleet)
    except VllmError as error:
        raise DemoError(str(error)) from error


def emulated_config(variant: Variant, *, time_scale: float = 1.0) -> FleetConfig:
    """Return the emulated engines of a variant: prefillers and decoders, or as many that do both."""
    if variant is Variant.AFFINITY:
        engines = [{"id": f"b{index}", **BOTH} for index in range(PREFILLERS + DECODERS)]
    else:
        engines = [{"id": f"p{index}", **PREFILLER} for index in range(PREFILLERS)]
        engines += [{"id": f"d{index}", **DECODER} for index in range(DECODERS)]
    return fleet_of(engines, defaults={"time_scale": time_scale})


class EmulatedSource:
    """A new emulated fleet for every run, in a child process; a context manager."""

    reference_url: str | None = None

    def __init__(self, *, time_scale: float = 1.0) -> None:
        self._time_scale = time_scale
        self._process = FleetProcess()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.close()

    @contextmanager
    def fresh(self, variant: Variant) -> Iterator[RunningFleet]:
        """Start the variant's fleet, and stop it after the block."""
        try:
            with self._process.fleet(emulated_config(variant, time_scale=self._time_scale)) as fleet:
                yield RunningFleet(
                    kind="emulated",
                    model=fleet.model,
                    urls={entry["id"]: entry["url"] for entry in fleet.entries},
                    broker_engines=fleet.entries,
                )
        except FleetProcessError as error:
            raise DemoError(str(error)) from error


class VllmSource:
    """The same vLLM servers for every run, restarted in between so that their caches are cold."""

    def __init__(self, fleet: VllmFleet) -> None:
        self._fleet = fleet
        self._used = False

    @property
    def reference_url(self) -> str | None:
        """The aggregated server without a connector."""
        return self._fleet.engines[EngineId("a0")].url

    @contextmanager
    def fresh(self, variant: Variant) -> Iterator[RunningFleet]:
        """Restart what an earlier run used. For affinity all servers do both, whatever they were started for."""
        entries = [dict(entry) for entry in self._fleet.broker_engines()]
        if self._used:
            for entry in entries:
                self._fleet.restart(entry["id"])
        self._used = True
        if variant is Variant.AFFINITY:
            entries = [{**entry, "role": "both"} for entry in entries]
        yield RunningFleet(
            kind="vllm",
            model=self._fleet.model,
            urls={str(entry["id"]): str(entry["url"]) for entry in entries},
            broker_engines=tuple(entries),
            call_bias=self._call_bias(),
        )

    def _call_bias(self) -> dict[str, int]:
        """Favour the end, forbid blanks: JSON allows them between all its parts, and a random model loves them."""
        engine = self._fleet.engines[EngineId("a0")]
        with plain_client(_TOKENIZE_BUDGET_S) as client:
            body = {"model": self._fleet.model, "prompt": "\t\n\r ", "add_special_tokens": False}
            blanks = client.post(f"{engine.url}/tokenize", json=body).raise_for_status().json()["tokens"]
        return {str(self._fleet.eos_token_id): 100} | {str(token): -100 for token in blanks}

"""A fleet of real vLLM servers on this machine's CPU, as a context manager."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import httpx2

import conserve_sdk
import conserve_vllm
from conserve_lab.ports import NoPortError, free_ports, wait_free
from conserve_lab.vllm._engine import (
    BLOCK_TOKENS,
    CONNECTOR,
    MODEL_NAME,
    TRANSFER_GROUP,
    Engine,
    EngineSpec,
    Role,
    engine_argv,
    engine_env,
)
from conserve_lab.vllm._launcher import SCRIPT, Launcher
from conserve_lab.vllm._model import ModelShape, eos_token_id, make_model
from conserve_lab.vllm.counters import EngineCounters, parse_counters
from conserve_lab.vllm.errors import VllmEngineDiedError, VllmMissingError, VllmStartError
from conserve_lab.vllm.install import installed_version, python_of
from conserve_sdk.core.units import EngineId, ModelName, Ms, Tokens

__all__ = ["FleetOptions", "VllmFleet", "find_venv"]

VENV_VARIABLE = "CONSERVE_VLLM_VENV"
DEFAULT_VENV = Path(".venv-vllm")
DEFAULT_CACHE = Path(".cache/vllm")
POLL_INTERVAL_S = 0.1
KILL_BUDGET_S = 20.0
LOG_TAIL_LINES = 5
KEY_ID = "fleet"
KEY_VARIABLE = "CONSERVE_FLEET_TOKEN_KEY"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """What to start.

    Attributes:
        prefillers: Engines `p0`, `p1`, ...
        decoders: Engines `d0`, `d1`, ...
        hosts: Engines `b0`, `b1`, ... that both prefill and decode, with the connector.
        references: Engines `a0`, ... without a connector: a plain aggregated server, to compare answers with.
        strangers: Up to two prefillers that no decoder can read from: `s0` calls the same model by
            another name, `s1` has blocks of another size.
        max_model_tokens: Longest prompt plus answer.
        kv_cache_tokens: Size of each engine's KV cache.
        max_sequences: Most requests in one engine's batch.
        hold_ms: How long a decoder keeps the blocks of a turn that asked for it. Whole seconds.
        start_budget_s: How long the fleet, or one restarted engine, may take to be healthy.
        shape: The model.
        leased_holds: Ids of engines with ConServe's own connector: holds with a time of their own.
        history_pulls: Ids of prefillers that may pull a conversation's KV from its decoder.
        host_tiers: Ids of engines with a host tier beside their cache.
        host_tier_tokens: Size of such a tier.
        guarded: Ids of engines that get a `LeaseGuard` in front; a broker then signs with `VllmFleet.token_key`.
    """

    prefillers: int = 1
    decoders: int = 2
    hosts: int = 0
    references: int = 0
    strangers: int = 0
    max_model_tokens: Tokens = Tokens(8_192)
    kv_cache_tokens: Tokens = Tokens(131_072)
    max_sequences: int = 32
    hold_ms: Ms = Ms(30_000)
    start_budget_s: float = 180.0
    shape: ModelShape = field(default_factory=ModelShape)
    guarded: frozenset[str] = frozenset()
    leased_holds: frozenset[str] = frozenset()
    history_pulls: frozenset[str] = frozenset()
    host_tiers: frozenset[str] = frozenset()
    host_tier_tokens: Tokens = Tokens(65_536)


def find_venv(venv: Path | None = None) -> Path:
    """Find the environment that holds vLLM.

    Args:
        venv: Where it is; None means `$CONSERVE_VLLM_VENV`, or `.venv-vllm` in the working directory.

    Returns:
        The environment.

    Raises:
        VllmMissingError: There is none, or it was made from other pins.
    """
    place = venv or Path(os.environ.get(VENV_VARIABLE, DEFAULT_VENV))
    if installed_version(place) is None:
        raise VllmMissingError(f"no vLLM in {place}; run: python -m conserve_lab.vllm {place}")
    return place


class VllmFleet:
    """Prefillers and decoders of one tiny model, started together and reachable on loopback.

        with VllmFleet(FleetOptions(references=1), say=print) as fleet:
            fleet.engines["d0"].api

    Logs go to one directory, which is removed at the end unless something failed (or `logs` was given).

    Args:
        options: What to start.
        venv: The environment that holds vLLM (see `find_venv`).
        cache: Where the model is kept between runs.
        logs: Where to write logs; None makes a temporary directory.
        say: Gets one line of progress at a time.
    """

    def __init__(
        self,
        options: FleetOptions | None = None,
        *,
        venv: Path | None = None,
        cache: Path = DEFAULT_CACHE,
        logs: Path | None = None,
        say: Say = lambda _line: None,
    ) -> None:
        self.options = options or FleetOptions()
        self._python = python_of(find_venv(venv))
        self._cache = cache
        self._keeps_logs = logs is not None
        self._given_logs = logs
        self._say = say
        self._secret = secrets.token_hex(32)
        self._specs: dict[EngineId, EngineSpec] = {}
        self._engines: dict[EngineId, Engine] = {}

    def __enter__(self) -> Self:
        """Start everything and wait until it is healthy.

        Raises:
            VllmStartError: It is not, within the budget; the message names the log.
            VllmEngineDiedError: An engine ended while starting.
        """
        started_at = time.monotonic()
        self._logs = self._given_logs or Path(tempfile.mkdtemp(prefix="conserve-vllm-"))
        self._logs.mkdir(parents=True, exist_ok=True)
        self._http = httpx2.Client(timeout=10.0, trust_env=False)
        self._say("making the model (once)")
        self._model = make_model(self.options.shape, python=self._python, cache=self._cache)
        self._say("importing vLLM")
        self._launcher = Launcher(self._python, env=self._shared_env(), log=self._logs / "launcher.log")
        try:
            self._launcher.wait_ready(self.options.start_budget_s)
            self._specs = {spec.engine_id: spec for spec in self._plan()}
            pids = {engine_id: self._launch(engine_id) for engine_id in self._specs}
            for engine_id, pid in pids.items():
                self._engines[engine_id] = self._when_healthy(engine_id, pid=pid)
        except BaseException:
            self._keeps_logs = True
            self._close()
            raise
        self._say(f"{len(self._engines)} engines healthy after {time.monotonic() - started_at:.1f} s")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill everything; keep the logs if something failed."""
        if kind is not None:
            self._keeps_logs = True
        self._close()

    @property
    def engines(self) -> Mapping[EngineId, Engine]:
        """The engines by id; after a restart the entry is a new one."""
        return MappingProxyType(self._engines)

    @property
    def model(self) -> ModelName:
        """The model's name in requests."""
        return MODEL_NAME

    @property
    def eos_token_id(self) -> int:
        """For `logit_bias={str(id): 100}`: a random model then ends its answer as soon as a grammar allows it."""
        return eos_token_id(self._model)

    @property
    def token_key(self) -> dict[str, str]:
        """The key that guards accept, as an entry of a broker's `token.keys`."""
        return {"kid": KEY_ID, "secret": self._secret}

    @property
    def kv_bytes_per_token(self) -> int:
        """What a transfer of one token weighs."""
        return self.options.shape.kv_bytes_per_token

    @property
    def logs_directory(self) -> Path:
        """Where the logs are."""
        return self._logs

    def broker_engines(self, *, references: bool = False) -> list[dict[str, Any]]:
        """The fleet as a broker's configuration lists it.

        Args:
            references: Whether to list the engines without a connector too.
        """
        return [e.broker_entry() for e in self._engines.values() if references or e.connector is not None]

    def kill(self, engine_id: str) -> None:
        """Kill an engine (SIGKILL, API server and engine core) and wait for its end."""
        self._launcher.kill(self._id(engine_id), timeout_s=KILL_BUDGET_S)

    def restart(self, engine_id: str) -> Engine:
        """Kill an engine if it runs, start it anew on the same ports with an empty cache, and wait for it.

        Raises:
            VllmStartError: It is not healthy within the budget, or its ports are taken.
            VllmEngineDiedError: It ended while starting.
        """
        name = self._id(engine_id)
        self.kill(name)
        spec = self._specs[name]
        try:
            wait_free([port for port in (spec.port, spec.side_channel_port) if port], timeout_s=KILL_BUDGET_S)
        except NoPortError as error:
            raise VllmStartError(str(error)) from error
        self._engines[name] = self._when_healthy(name, pid=self._launch(name))
        return self._engines[name]

    def is_alive(self, engine_id: str) -> bool:
        """Whether the engine's process runs (it may still be unable to answer)."""
        return self._launcher.exit_code(self._id(engine_id)) is None

    def wait_dead(self, engine_id: str, *, timeout_s: float) -> bool:
        """Wait for an engine to end by itself; returns whether it did."""
        return self._launcher.wait_exit(self._id(engine_id), timeout_s=timeout_s) is not None

    def metrics(self, engine_id: str) -> EngineCounters:
        """Read an engine's counters.

        Raises:
            httpx2.HTTPError: It does not answer.
        """
        answer = self._http.get(f"{self._engines[self._id(engine_id)].url}/metrics")
        return parse_counters(answer.raise_for_status().text)

    def logs(self, engine_id: str) -> str:
        """All that an engine has logged, over its restarts."""
        return self._log_of(self._id(engine_id)).read_text(errors="replace")

    def _plan(self) -> Iterator[EngineSpec]:
        options = self.options
        kinds: list[tuple[str, Role, int, bool]] = [
            ("p", "prefiller", options.prefillers, True),
            ("d", "decoder", options.decoders, True),
            ("b", "both", options.hosts, True),
            ("a", "both", options.references, False),
            ("s", "prefiller", options.strangers, True),
        ]
        try:
            ports = iter(free_ports(2 * sum(count for _, _, count, _ in kinds)))
        except NoPortError as error:
            raise VllmStartError(str(error)) from error
        for letter, role, count, moves_kv in kinds:
            for number in range(count):
                port, side_channel = next(ports), next(ports)
                yield EngineSpec(
                    engine_id=EngineId(f"{letter}{number}"),
                    role=role,
                    port=port,
                    side_channel_port=side_channel if moves_kv else None,
                    model_path=str(self._alias() if f"{letter}{number}" == "s0" else self._model),
                    block_tokens=Tokens(2 * BLOCK_TOKENS if f"{letter}{number}" == "s1" else BLOCK_TOKENS),
                    max_model_tokens=options.max_model_tokens,
                    kv_cache_bytes=options.kv_cache_tokens * options.shape.kv_bytes_per_token,
                    max_sequences=options.max_sequences,
                    hold_ms=options.hold_ms,
                    leased_holds=f"{letter}{number}" in options.leased_holds,
                    history_pulls=f"{letter}{number}" in options.history_pulls,
                    host_tier_tokens=Tokens(
                        options.host_tier_tokens if f"{letter}{number}" in options.host_tiers else 0
                    ),
                    kv_bytes_per_token=options.shape.kv_bytes_per_token,
                    guard_key=f"{KEY_ID}=env:{KEY_VARIABLE}" if f"{letter}{number}" in options.guarded else "",
                )

    def _shared_env(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE", "VLLM", "VIRTUAL_ENV"))}
        return kept | {
            "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(self._packages())]),
            KEY_VARIABLE: self._secret,
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CACHE_ROOT": str(self._cache.absolute() / "vllm"),
            "VLLM_CONFIG_ROOT": str(self._cache.absolute() / "config"),
            # Two processes an engine instead of three; the model is far too small for threads.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
        }

    def _packages(self) -> Path:
        """A folder with guard and connector and nothing else: vLLM's environment has its own of everything."""
        folder = self._logs / "packages"
        folder.mkdir(exist_ok=True)
        for package in (conserve_sdk, conserve_vllm):
            link = folder / package.__name__
            if not link.exists():
                link.symlink_to(Path(package.__path__[0]).absolute(), target_is_directory=True)
        return folder

    def _alias(self) -> Path:
        """The same model by another name."""
        alias = self._logs / "another-name"
        if not alias.exists():
            alias.symlink_to(self._model, target_is_directory=True)
        return alias

    def _launch(self, engine_id: EngineId) -> int:
        spec = self._specs[engine_id]
        self._say(f"starting {engine_id} ({spec.role}) on port {spec.port}")
        return self._launcher.start(
            engine_id,
            argv=engine_argv(spec),
            env=engine_env(spec),
            log=self._log_of(engine_id),
            timeout_s=self.options.start_budget_s,
        )

    def _when_healthy(self, engine_id: EngineId, *, pid: int) -> Engine:
        spec = self._specs[engine_id]
        url = f"http://127.0.0.1:{spec.port}"
        deadline = time.monotonic() + self.options.start_budget_s
        while not self._is_healthy(url):
            if (code := self._launcher.exit_code(engine_id)) is not None:
                raise VllmEngineDiedError(f"{engine_id} ended with code {code} while starting: {self._tail(engine_id)}")
            if time.monotonic() > deadline:
                budget = self.options.start_budget_s
                raise VllmStartError(f"{engine_id} is not healthy after {budget:.0f} s: {self._tail(engine_id)}")
            time.sleep(POLL_INTERVAL_S)
        self._say(f"{engine_id} is healthy")
        counters = parse_counters(self._http.get(f"{url}/metrics").raise_for_status().text)
        moves_kv = spec.side_channel_port is not None
        return Engine(
            engine_id=engine_id,
            role=spec.role,
            url=url,
            model=MODEL_NAME,
            connector=CONNECTOR if moves_kv else None,
            transfer_group=TRANSFER_GROUP if moves_kv else "",
            block_size_tokens=Tokens(counters.block_size_tokens),
            kv_capacity_tokens=Tokens(counters.kv_capacity_tokens),
            max_model_len_tokens=spec.max_model_tokens,
            max_hold_ms=spec.max_hold_ms,
            pid=pid,
        )

    def _is_healthy(self, url: str) -> bool:
        try:
            return self._http.get(f"{url}/health").status_code == httpx2.codes.OK
        except httpx2.TransportError:
            return False  # not listening yet

    def _tail(self, engine_id: EngineId) -> str:
        lines = self.logs(engine_id).splitlines()[-LOG_TAIL_LINES:]
        return f"{' | '.join(line.strip() for line in lines)} (whole log: {self._log_of(engine_id)})"

    def _log_of(self, engine_id: EngineId) -> Path:
        return self._logs / f"{engine_id}.log"

    def _id(self, engine_id: str) -> EngineId:
        if engine_id not in self._specs:
            raise VllmStartError(f"no engine {engine_id!r} in this fleet; there are {', '.join(self._specs)}")
        return EngineId(engine_id)

    def _close(self) -> None:
        self._launcher.close()
        self._http.close()
        if self._keeps_logs:
            self._say(f"logs are in {self._logs}")
        else:
            shutil.rmtree(self._logs, ignore_errors=True)

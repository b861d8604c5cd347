"""A simulated fleet under one policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from conserve_lab.engine_model import EngineModelConfig
from conserve_lab.hardware import EngineKind
from conserve_lab.simulator.broker import SimulatedBroker
from conserve_lab.simulator.engine import SimulatedEngine
from conserve_lab.simulator.kernel import Kernel
from conserve_lab.simulator.policies import Policy
from conserve_sdk.core.events import EngineSpec
from conserve_sdk.core.settings import PRESETS, BrokerSettings
from conserve_sdk.core.units import MILLION, EngineId, ModelName, Ms, Tokens, TransferGroup
from conserve_sdk.core.vocabulary import Role

BLOCK_SIZE = 16
SEQS_MAX = 1024
HOST_TIMES = 6
"""Host memory per engine, in times its KV cache."""
_FOREVER = Ms(1 << 40)


class Fleet:
    """Engines, and the broker if the policy has one.

    Args:
        kernel: virtual time.
        policy: how the engines are used.
        kinds: one per engine, prefillers first.
    """

    block_size = BLOCK_SIZE

    def __init__(self, kernel: Kernel, policy: Policy, kinds: Sequence[EngineKind]) -> None:
        self.kernel = kernel
        self.policy = policy
        prefillers = policy.prefillers(len(kinds))
        self.engines = [
            self._engine(f"{'p' if number < prefillers else 'd'}{number}", kind, prefills=number < prefillers)
            for number, kind in enumerate(kinds)
        ]
        self._by_id = {engine.name: engine for engine in self.engines}
        self.prefillers, self.decoders = self.engines[:prefillers], self.engines[prefillers:]
        self.sessions = dict.fromkeys(self._by_id, 0)
        self._turns = [0, 0]
        self.broker = self._broker(prefillers) if policy.preset else None

    def engine(self, engine_id: EngineId) -> SimulatedEngine:
        """The engine of this id."""
        return self._by_id[engine_id]

    def next_prefiller(self) -> SimulatedEngine | None:
        """Round robin; None in a fleet without roles."""
        return self._next(0, self.prefillers) if self.prefillers else None

    def next_decoder(self) -> SimulatedEngine:
        """Round robin."""
        return self._next(1, self.decoders)

    def _next(self, role: int, engines: Sequence[SimulatedEngine]) -> SimulatedEngine:
        self._turns[role] += 1
        usable = [engine for engine in engines if engine.takes_new] or engines
        return usable[self._turns[role] % len(usable)]

    def least_sessions(self, number: int) -> tuple[SimulatedEngine | None, SimulatedEngine]:
        """The decoder with the fewest conversations, which gets one more, and a prefiller by the conversation."""
        usable = [engine for engine in self.decoders if engine.takes_new] or self.decoders
        decoder = min(usable, key=lambda engine: (self.sessions[engine.name], engine.name))
        self.sessions[decoder.name] += 1
        return self.prefillers[number % len(self.prefillers)] if self.prefillers else None, decoder

    def drain(self, engine: SimulatedEngine, *, draining: bool) -> None:
        """Give an engine nothing new, or let it take part again."""
        engine.draining = draining
        if self.broker is not None:
            self.broker.drain(EngineId(engine.name), draining=draining)

    def _engine(self, name: str, kind: EngineKind, *, prefills: bool) -> SimulatedEngine:
        blocks = kind.kv_tokens // BLOCK_SIZE
        config = EngineModelConfig(
            block_size=BLOCK_SIZE,
            kv_blocks=blocks,
            max_num_seqs=SEQS_MAX,
            max_num_batched_tokens=self.policy.prefill_chunk if prefills else self.policy.decode_chunk,
            long_prefill_token_threshold=(
                self.policy.prefiller_long_tokens if prefills else self.policy.long_prefill_tokens
            ),
            priority_scheduling=self.policy.slice_tokens > 0,
            enable_prefix_caching=self.policy.prefix_caching,
            host_blocks=blocks * HOST_TIMES if self.policy.host_tier else 0,
            cost=kind.cost,
        )
        return SimulatedEngine(self.kernel, name, kind, config)

    def _broker(self, prefillers: int) -> SimulatedBroker:
        placement = PRESETS[self.policy.preset]
        bytes_per_s = self.engines[0].kind.transfer.bytes_per_s
        placement = replace(
            placement,
            **dict(self.policy.placement),
            transfer_tokens_per_s=bytes_per_s // self.engines[0].kind.transfer.kv_bytes_per_token,
        )
        settings = BrokerSettings(
            placement=placement,
            wait_max_ms=_FOREVER,
            queue_max=1_000_000,
        )
        specs = [
            EngineSpec(
                engine_id=EngineId(engine.name),
                url=f"http://{engine.name}.invalid",
                role=Role.PREFILLER if number < prefillers else Role.DECODER if prefillers else Role.BOTH,
                model=ModelName("simulated"),
                transfer_group=TransferGroup("simulated"),
                host_tier_tokens=Tokens(engine.model.config.host_blocks * BLOCK_SIZE),
                kv_capacity_tokens=Tokens(engine.kind.kv_tokens * self.policy.kv_budget_ppm // MILLION),
            )
            for number, engine in enumerate(self.engines)
        ]
        return SimulatedBroker(self.kernel, settings, list(zip(specs, self.engines, strict=True)))

"""What one vLLM server is told: its flags, its environment, and how the rest of the fleet knows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from conserve_sdk.core.units import EngineId, ModelName, Ms, Tokens

__all__ = ["MODEL_NAME", "Engine", "EngineSpec", "Role", "engine_argv", "engine_env"]

Role = Literal["prefiller", "decoder", "both"]

MODEL_NAME = ModelName("conserve-tiny")
CONNECTOR = "NixlConnector"
QUIET_MODULE = "conserve_vllm.quiet_nixl"
LEASED_MODULE = "conserve_vllm.leased_nixl"
TRANSFER_GROUP = "nixl"

# NIXL on a CPU works with multiples of 32 only (the CPU attention's block size).
BLOCK_TOKENS = Tokens(32)

# The connector's own `kv_lease_duration`, which prefillers keep.
STOCK_HOLD_MS = Ms(30_000)

# How long a decoder keeps a turn's blocks by `bidirectional_kv_xfer`; vLLM's own 480 s are longer than tests wait.
DECODER_BLOCKS_TTL_S = 2

KV_ROLES: dict[Role, str] = {"prefiller": "kv_producer", "decoder": "kv_consumer", "both": "kv_both"}


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One server to start.

    Attributes:
        engine_id: Its name in the fleet.
        role: What it is for.
        port: Where its OpenAI API listens on 127.0.0.1.
        side_channel_port: Where its NIXL handshake listens; None leaves the connector out, so that the engine moves
            no KV at all.
        model_path: The model's directory; NIXL compares this very string between two engines.
        max_model_tokens: Longest prompt plus answer.
        kv_cache_bytes: Size of its KV cache; it must hold one `max_model_tokens` at least.
        max_sequences: Most requests in one batch.
        hold_ms: How long a decoder keeps a turn's blocks when asked to by `do_remote_decode`. A prefiller's blocks
            wait vLLM's own 30 s for whoever fetches them.
        block_tokens: Size of a KV block.
        leased_holds: Whether its connector knows holds by lease.
        history_pulls: Whether it may pull a conversation's KV from where that was decoded (`bidirectional_kv_xfer`).
        host_tier_tokens: KV that it may keep in host memory beside the cache; 0: none.
        kv_bytes_per_token: What a token of the host tier weighs.
        guard_key: The broker's token key as `kid=env:NAME`, for a `LeaseGuard` in front; "" starts none.
    """

    engine_id: EngineId
    role: Role
    port: int
    side_channel_port: int | None
    model_path: str
    max_model_tokens: Tokens
    kv_cache_bytes: int
    max_sequences: int
    hold_ms: Ms
    block_tokens: Tokens = BLOCK_TOKENS
    leased_holds: bool = False
    history_pulls: bool = False
    host_tier_tokens: Tokens = Tokens(0)
    kv_bytes_per_token: int = 0
    guard_key: str = ""

    @property
    def max_hold_ms(self) -> Ms:
        """How long this engine keeps finished blocks for whoever may want them."""
        if self.side_channel_port is None:
            return Ms(0)
        return STOCK_HOLD_MS if self.role == "prefiller" else self.hold_ms


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A running server, as a client or a broker sees it.

    Attributes:
        engine_id: Its name in the fleet.
        role: What it is for.
        url: Its base URL, without `/v1`.
        model: The model's name in requests.
        connector: The KV connector's class, or None.
        transfer_group: Engines of one group can move KV between each other; `""` for an engine without a connector.
        block_size_tokens: Size of a KV block.
        kv_capacity_tokens: Size of its KV cache.
        max_model_len_tokens: Longest prompt plus answer.
        max_hold_ms: How long it keeps a turn's blocks when asked to; 0 without a connector.
        pid: Its process; another one after every restart.
    """

    engine_id: EngineId
    role: Role
    url: str
    model: ModelName
    connector: str | None
    transfer_group: str
    block_size_tokens: Tokens
    kv_capacity_tokens: Tokens
    max_model_len_tokens: Tokens
    max_hold_ms: Ms
    pid: int

    @property
    def api(self) -> str:
        """The base URL of its OpenAI API."""
        return f"{self.url}/v1"

    def broker_entry(self) -> dict[str, Any]:
        """Its entry in a broker's engine list."""
        return {
            "id": self.engine_id,
            "url": self.url,
            "role": self.role,
            "model": self.model,
            "connector": self.connector,
            "transfer_group": self.transfer_group,
            "block_size_tokens": self.block_size_tokens,
            "max_hold_ms": self.max_hold_ms,
        }


def engine_argv(spec: EngineSpec) -> list[str]:
    """The flags of vLLM's API server for this engine.

    Returns:
        Arguments without the program.
    """
    argv = [
        *("--model", spec.model_path, "--served-model-name", MODEL_NAME),
        *("--host", "127.0.0.1", "--port", str(spec.port), "--uvicorn-log-level", "warning"),
        # float32: bit-equal answers on both sides of a transfer, and several times faster here than bfloat16.
        *("--dtype", "float32", "--enforce-eager", "--block-size", str(spec.block_tokens)),
        *("--max-model-len", str(spec.max_model_tokens), "--max-num-seqs", str(spec.max_sequences)),
        *("--kv-cache-memory-bytes", str(spec.kv_cache_bytes)),
        "--enable-prompt-tokens-details",
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        # A random model loves whitespace: without this a JSON answer need never end.
        *("--structured-outputs-config", _json(backend="xgrammar", disable_any_whitespace=True)),
    ]
    if spec.side_channel_port is not None:
        argv += ["--kv-transfer-config", _json(**_transfer_config(spec))]
    if spec.guard_key:
        argv += ["--middleware", "conserve_vllm.LeaseGuard"]
    return argv


def engine_env(spec: EngineSpec) -> dict[str, str]:
    """What this engine needs in its environment beyond what all of a fleet share."""
    env: dict[str, str] = {}
    if spec.side_channel_port is not None:
        env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "127.0.0.1"
        env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(spec.side_channel_port)
    if spec.guard_key:
        env["CONSERVE_GUARD_ENGINE_ID"] = spec.engine_id
        env["CONSERVE_GUARD_KEYS"] = spec.guard_key
    return env


def _transfer_config(spec: EngineSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": QUIET_MODULE,
        "kv_role": KV_ROLES[spec.role],
    }
    if spec.role != "prefiller":
        config["kv_connector_extra_config"] = {"kv_lease_duration": spec.hold_ms // 1000}
        # A failed transfer then costs a local prefill; with vLLM's default it is an HTTP 500.
        config["kv_load_failure_policy"] = "recompute"
    if spec.history_pulls:
        pulls = {"bidirectional_kv_xfer": True, "decoder_kv_blocks_ttl": DECODER_BLOCKS_TTL_S}
        config["kv_connector_extra_config"] = config.get("kv_connector_extra_config", {}) | pulls
    if spec.leased_holds:
        config["kv_connector_module_path"] = LEASED_MODULE
        config.setdefault("kv_connector_extra_config", {})["conserve_quiet"] = True
    return _with_host_tier(config, spec) if spec.host_tier_tokens else config


def _with_host_tier(config: dict[str, Any], spec: EngineSpec) -> dict[str, Any]:
    """Both connectors, side by side; the transfer's own first, because the first one that has the KV loads it."""
    tier = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "HostCopySpec",
            "spec_module_path": "host_copy",
            "cpu_bytes_to_use": spec.host_tier_tokens * spec.kv_bytes_per_token,
        },
    }
    policy = {key: config[key] for key in ("kv_load_failure_policy",) if key in config}
    inner = {key: value for key, value in config.items() if key not in policy}
    return {
        "kv_connector": "MultiConnector",
        "kv_role": config["kv_role"],
        "kv_connector_extra_config": {"connectors": [inner, tier]},
        **policy,
    }


def _json(**fields: object) -> str:
    return json.dumps(fields)

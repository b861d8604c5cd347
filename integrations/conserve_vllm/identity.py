"""Who this engine is, read from vLLM's own objects inside its API server: what no route of vLLM tells."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conserve_sdk.core.units import Incarnation, Ms
from conserve_vllm.settings import GuardSettings

__all__ = [
    "KV_ROLES",
    "api_servers",
    "describe",
    "kept_ms",
    "knows_leases",
    "nixl_extra",
    "process_incarnation",
    "served_model",
]

KV_ROLES = {"kv_producer": "prefiller", "kv_consumer": "decoder", "kv_both": "both"}
STOCK_LEASE_S = 30
LEASED_MODULE = "conserve_vllm.leased_nixl"


def process_incarnation(pid: str = "self", *, proc: Path = Path("/proc")) -> Incarnation:
    """This process's incarnation, as a broker derives it from `process_start_time_seconds` of the metrics page.

    The same arithmetic as the Prometheus client's collector, so that both come to the same hundredth of a second.
    """
    try:
        fields = (proc / pid / "stat").read_text().rpartition(")")[2].split()
        booted_s = next(
            float(line.split()[1]) for line in (proc / "stat").read_text().splitlines() if line.startswith("btime ")
        )
        started_s = float(fields[19]) / os.sysconf("SC_CLK_TCK") + booted_s
    except (OSError, StopIteration, IndexError, ValueError):
        return Incarnation("")  # not Linux: nobody can tell, so nothing is compared
    return Incarnation(f"started-{started_s:.2f}")


def kept_ms(state: object) -> Ms:
    """For how long this engine keeps the blocks of a finished prefill (`kv_lease_duration`)."""
    extra = nixl_extra(_at(state, "vllm_config", "kv_transfer_config", "kv_connector_extra_config"))
    return Ms(int(float(extra.get("kv_lease_duration", STOCK_LEASE_S)) * 1000))


def knows_leases(state: object) -> bool:
    """Whether this engine's connector is `leased_nixl`."""
    transfer = _at(state, "vllm_config", "kv_transfer_config")
    extra = _at(transfer, "kv_connector_extra_config")
    paths = [
        _at(transfer, "kv_connector_module_path"),
        *(c.get("kv_connector_module_path") for c in _connectors(extra)),
    ]
    return LEASED_MODULE in paths


def served_model(state: object) -> str:
    """A name that this engine answers to; "" if it is not known."""
    return next(iter(_models(state)), "")


def _models(state: object) -> list[str]:
    names = _at(state, "args", "served_model_name")
    return list(names) if names else [name for name in [_at(state, "args", "model")] if name]


def nixl_extra(extra: object) -> Mapping[str, Any]:
    """NIXL's own extra configuration, where it stands alone or beside another connector (`MultiConnector`)."""
    return _extra_of("NixlConnector", extra) if _connectors(extra) else extra if isinstance(extra, Mapping) else {}


def _extra_of(connector: str, extra: object) -> Mapping[str, Any]:
    """One connector's extra configuration inside a `MultiConnector`'s; empty if it is not among them."""
    found = (each for each in _connectors(extra) if each.get("kv_connector") == connector)
    return next((each.get("kv_connector_extra_config") or {} for each in found), {})


def _connectors(extra: object) -> list[Mapping[str, Any]]:
    listed = extra.get("connectors") if isinstance(extra, Mapping) else None
    return [each for each in listed if isinstance(each, Mapping)] if isinstance(listed, list) else []


def _host_tier_tokens(state: object) -> int | None:
    """How much KV fits into the host tier; None where the size of a token is not known here."""
    extra = _at(state, "vllm_config", "kv_transfer_config", "kv_connector_extra_config")
    size_bytes = _extra_of("OffloadingConnector", extra).get("cpu_bytes_to_use", 0)
    cache_bytes = _at(state, "vllm_config", "cache_config", "kv_cache_memory_bytes")
    cache_tokens = _at(state, "vllm_config", "cache_config", "kv_cache_size_tokens")
    if not size_bytes:
        return 0
    return int(size_bytes) * int(cache_tokens) // int(cache_bytes) if cache_bytes and cache_tokens else None


def api_servers(state: object) -> int:
    """How many processes serve this engine's API."""
    return int(_at(state, "args", "api_server_count") or 1)


def describe(state: object, settings: GuardSettings, *, incarnation: Incarnation) -> dict[str, Any]:
    """What `/conserve/engine` answers; null for what this server does not know of itself."""
    transfer = _at(state, "vllm_config", "kv_transfer_config")
    connector = _at(transfer, "kv_connector")
    return {
        "engine_id": settings.engine_id,
        "incarnation": incarnation,
        "role": settings.role or KV_ROLES.get(str(_at(transfer, "kv_role")), "both"),
        "tier": settings.tier,
        "models": _models(state),
        "model_path": _at(state, "vllm_config", "model_config", "model"),
        "max_model_len_tokens": _at(state, "vllm_config", "model_config", "max_model_len"),
        "block_size_tokens": _at(state, "vllm_config", "cache_config", "block_size"),
        "prefix_caching": _at(state, "vllm_config", "cache_config", "enable_prefix_caching"),
        "prompt_tokens_details": _at(state, "args", "enable_prompt_tokens_details"),
        "connector": connector,
        "kv_engine_id": _at(transfer, "engine_id") if connector else None,
        "kv_load_failure_policy": _at(transfer, "kv_load_failure_policy") if connector else None,
        "kv_lease_duration_ms": kept_ms(state) if connector else 0,
        "leased_holds": knows_leases(state),
        "host_tier_tokens": _host_tier_tokens(state),
        "side_channel": _side_channel() if connector else None,
        "require_lease": settings.require_lease,
    }


def _side_channel() -> dict[str, Any]:
    """Where NIXL's handshake listens; vLLM's own defaults apply (`envs.py`)."""
    return {
        "host": os.environ.get("VLLM_NIXL_SIDE_CHANNEL_HOST", "localhost"),
        "port": int(os.environ.get("VLLM_NIXL_SIDE_CHANNEL_PORT", "5600")),
    }


def _at(thing: object, *names: str) -> Any:
    """An attribute of an attribute; None as soon as one is missing, as other versions of vLLM may have it."""
    for name in names:
        thing = getattr(thing, name, None)
    return thing

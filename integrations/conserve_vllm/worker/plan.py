"""From options and a command to what will really be run: pure, so that `--dry-run` shows exactly that."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from conserve_vllm.identity import LEASED_MODULE, nixl_extra
from conserve_vllm.worker.flags import VllmCommand, is_vllm
from conserve_vllm.worker.options import Clash, WorkerOptions

__all__ = ["Plan", "make_plan"]

MIDDLEWARE = "conserve_vllm.LeaseGuard"
CONNECTOR = "NixlConnector"
QUIET_MODULE = "conserve_vllm.quiet_nixl"
GIB = 1 << 30
KV_ROLES = {"prefiller": "kv_producer", "decoder": "kv_consumer", "both": "kv_both"}
VLLM_PORT = 8000
STOCK_LEASE_MS = 30_000
TTL_MIN_MS, TTL_MAX_MS = 1_000, 600_000
"""What the broker takes."""
ANY_HOST = ("", "0.0.0.0", "::", "[::]")  # noqa: S104 -- recognised, not bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be run and what the broker is told.

    Attributes:
        argv: program and arguments.
        env: variables on top of the environment.
        url: where the engine will answer.
        entry: body of the registration, without what only the running engine knows.
        notes: what is worth knowing about the choices made.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    url: str
    entry: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def shown(self) -> str:
        """The plan as lines of a shell script."""
        lines = [f"# {note}" for note in self.notes]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        lines += [shlex.join(self.argv), f"# registers as {json.dumps(dict(self.entry), sort_keys=True)}"]
        return "\n".join(lines)


def make_plan(options: WorkerOptions, command: Sequence[str], env: Mapping[str, str], *, life: str) -> Plan:
    """Complete the command.

    Args:
        options: what stands before `--`.
        command: what stands after it.
        env: the environment.
        life: makes the connector's engine id another one in every life: a peer that still knows the blocks of the last
            life must not read them from this one.

    Raises:
        Clash: they contradict each other, or something is missing.
    """
    if not command:
        raise Clash("nothing to run: put the engine's command after --, such as -- vllm serve MODEL")
    if not is_vllm(command):
        return _plain_plan(options, command, env)
    line = VllmCommand(command)
    url = options.url or _url_of(line)
    model = options.model or line.value("--served-model-name") or line.model_path
    if not model:
        raise Clash("the command names no model: vllm serve MODEL")
    notes = list(_check(line, options))
    _set_transfer(line, options, life=life)
    if not line.has("--no-enable-prompt-tokens-details") and not line.has("--enable-prompt-tokens-details"):
        line.argv.append("--enable-prompt-tokens-details")
    if options.guard and MIDDLEWARE not in line.values("--middleware"):
        line.argv += ["--middleware", MIDDLEWARE]
    return Plan(
        argv=tuple(line.argv),
        env=_side_channel(options, url, env) | _guard_env(options, env),
        url=url,
        entry=_entry(options, url=url, model=model, held_ms=_held_ms(line)),
        notes=tuple(notes),
    )


def _plain_plan(options: WorkerOptions, command: Sequence[str], env: Mapping[str, str]) -> Plan:
    """Any other server: it is started as it is."""
    if not options.url or not options.model:
        raise Clash(f"{command[0]} is not vLLM, so --url and --model must say where it answers and what it serves")
    return Plan(
        argv=tuple(command),
        env=_guard_env(options, env),
        url=options.url,
        entry=_entry(options, url=options.url, model=options.model, held_ms=options.hold_s * 1000),
        notes=(f"{command[0]} is not vLLM: its flags are left as they are",),
    )


def _check(line: VllmCommand, options: WorkerOptions) -> list[str]:
    """Flags that would undo what was asked for are errors; those that only cost something are notes."""
    servers = line.value("--api-server-count")
    if options.guard and servers not in (None, "1"):
        raise Clash(f"--api-server-count {servers} and the guard: each server would remember used transfers for itself")
    if options.role != "prefiller" and line.has("--no-enable-prefix-caching"):
        raise Clash("--no-enable-prefix-caching on a decoder: every turn would be computed from its beginning")
    if options.host_tier_gib and options.role == "prefiller":
        raise Clash("--host-tier-gib is for engines that keep conversations: decoders, or role both")
    notes = []
    if line.has("--no-enable-prompt-tokens-details"):
        notes.append("without prompt token details nobody can see how much of a turn was found in the cache")
    if not options.guard:
        notes.append("without the guard any client that reaches this engine can end it or make it answer wrong text")
    return notes


def _set_transfer(line: VllmCommand, options: WorkerOptions, *, life: str) -> None:
    """Complete `--kv-transfer-config`; what the command says wins, unless it contradicts the role or the guard."""
    flag = "--kv-transfer-config"
    given = line.json_value(flag)
    wanted = _wanted_transfer(options, life=life)
    for name in ("kv_connector", "kv_role", "kv_connector_module_path"):
        if name in wanted and given.get(name, wanted[name]) != wanted[name]:
            raise Clash(f"{flag} says {name}={given[name]!r}, but the options of the worker ask for {wanted[name]!r}")
    extra = {**wanted.get("kv_connector_extra_config", {}), **given.get("kv_connector_extra_config", {})}
    merged = wanted | given | ({"kv_connector_extra_config": extra} if extra else {})
    if options.host_tier_gib:
        merged = _beside_host_tier(merged, options)
    line.replace(flag, json.dumps(merged))


def _wanted_transfer(options: WorkerOptions, *, life: str) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "kv_connector": CONNECTOR,
        "kv_role": KV_ROLES[options.role],
        "engine_id": f"{options.engine_id}-{life}",
    }
    if options.role != "prefiller":
        # A failed transfer then costs a local prefill; with vLLM's default it is an HTTP 500.
        wanted["kv_load_failure_policy"] = "recompute"
        wanted["kv_connector_extra_config"] = {"kv_lease_duration": options.hold_s}
    if options.leased_holds and options.role != "prefiller":
        wanted["kv_connector_module_path"] = LEASED_MODULE
        wanted["kv_connector_extra_config"]["conserve_quiet"] = options.quiet_nixl
    elif options.quiet_nixl:
        wanted["kv_connector_module_path"] = QUIET_MODULE
    return wanted


def _beside_host_tier(transfer: Mapping[str, Any], options: WorkerOptions) -> dict[str, Any]:
    """NIXL and vLLM's offloading side by side. NIXL first: a request that brings params is loaded by it."""
    tier = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": int(options.host_tier_gib * GIB)},
    }
    shared = {name: transfer[name] for name in ("kv_load_failure_policy", "engine_id") if name in transfer}
    inner = {name: value for name, value in transfer.items() if name != "kv_load_failure_policy"}
    return {
        "kv_connector": "MultiConnector",
        "kv_role": transfer["kv_role"],
        "kv_connector_extra_config": {"connectors": [inner, tier]},
        **shared,
    }


def _held_ms(line: VllmCommand) -> int:
    extra = nixl_extra(line.json_value("--kv-transfer-config").get("kv_connector_extra_config"))
    return int(float(extra.get("kv_lease_duration", STOCK_LEASE_MS // 1000)) * 1000)


def _url_of(line: VllmCommand) -> str:
    host = line.value("--host") or ""
    if host in ANY_HOST:
        raise Clash("clients cannot be told an address: give --url http://HOST:PORT as they reach this engine")
    scheme = "https" if line.has("--ssl-keyfile") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{line.value('--port') or VLLM_PORT}"


def _side_channel(options: WorkerOptions, url: str, env: Mapping[str, str]) -> dict[str, str]:
    """Where decoders shake hands with this engine; the environment's own values win."""
    host = options.side_channel_host or urlsplit(url).hostname or "localhost"
    wanted = {"VLLM_NIXL_SIDE_CHANNEL_HOST": host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(options.side_channel_port)}
    return {name: env.get(name) or value for name, value in wanted.items()}


def _guard_env(options: WorkerOptions, env: Mapping[str, str]) -> dict[str, str]:
    if not options.guard:
        return {}
    keys = options.token_keys or env.get("CONSERVE_GUARD_KEYS", "")
    if not keys:
        raise Clash("the guard needs the broker's token keys: --token-keys kid=file:/path, or --no-guard")
    found = {
        "CONSERVE_GUARD_ENGINE_ID": options.engine_id,
        "CONSERVE_GUARD_KEYS": keys,
        "CONSERVE_GUARD_ROLE": options.role,
    }
    if options.require_lease:
        found["CONSERVE_GUARD_REQUIRE_LEASE"] = "1"
    if options.tier:
        found["CONSERVE_GUARD_TIER"] = options.tier
    for name, value in found.items():
        if name != "CONSERVE_GUARD_KEYS" and env.get(name, value) != value:
            raise Clash(f"{name}={env[name]!r} in the environment contradicts the options of the worker ({value!r})")
    return found


def _entry(options: WorkerOptions, *, url: str, model: str, held_ms: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "url": url,
        "role": options.role,
        "model": model,
        "transfer_group": options.transfer_group,
        "max_hold_ms": held_ms,
        "ttl_ms": min(max(int(options.heartbeat_s * 3000), TTL_MIN_MS), TTL_MAX_MS),
    }
    return entry | ({"tier": options.tier} if options.tier else {})

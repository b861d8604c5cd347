"""What is found out about one engine by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from conserve_sdk.doctor._finding import Finding, fail, note, ok
from conserve_sdk.doctor._kept import check_kept
from conserve_sdk.doctor._look import EngineFacts
from conserve_sdk.doctor._page import MetricsPage

__all__ = ["RestSample", "check_engine", "check_rest"]

OLDEST_VERSION = (0, 11)
MEASURED_VERSION = "0.32"
LEASE_S_MIN = 25
"""The SDK sends transfer params for up to 20 s (`Timeouts.transfer_s`); vLLM's own lease is 30 s."""
IDLE_CORES_MAX = 0.5

CONNECTOR_FIX = """start it with --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_%s", ...}'"""
NOT_TOLD = "not told (vLLM does not tell it, a guard in the engine would)"


def check_engine(facts: EngineFacts) -> Iterator[Finding]:
    """Judge what the engine told."""
    yield _model(facts)
    yield _version(facts)
    yield _connector(facts)
    yield _role(facts)
    yield _prefix_caching(facts)
    if facts.role != "prefiller":
        yield _failure_policy(facts)
    yield _lease(facts)
    yield from check_kept(facts)
    yield _guard(facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestSample:
    """One look at an engine that should be idle.

    Attributes:
        at_s: monotonic instant.
        tree_s: CPU time of all its processes; None when it runs on another machine.
    """

    page: MetricsPage
    at_s: float
    tree_s: float | None = None


def check_rest(name: str, first: RestSample, later: RestSample) -> Finding:
    """Judge how much CPU the engine took while nothing was asked of it.

    NIXL's progress thread polls without a pause: one core per engine, measured with NIXL 1.5. It is in the engine
    core's process, so it shows only from the engine's own machine; the metrics page has the API server's process.
    """
    check = "cpu_at_rest"
    signs = ("vllm:num_requests_running", "vllm:kv_cache_usage_perc")
    if any(sample.page.total(sign) for sample in (first, later) for sign in signs):
        return note(name, check, "CPU at rest not judged: it has requests running, or blocks held, just now")
    whole = first.tree_s is not None and later.tree_s is not None
    spent_s = [sample.tree_s if whole else sample.page.total("process_cpu_seconds_total") for sample in (first, later)]
    before_s, after_s = spent_s
    if before_s is None or after_s is None:
        return note(name, check, "CPU at rest not told: its metrics have no process_cpu_seconds_total")
    cores = max(after_s - before_s, 0.0) / max(later.at_s - first.at_s, 0.001)
    seen = f"{'all its processes together take' if whole else 'its API server takes'} {cores:.2f} cores at rest"
    if cores > IDLE_CORES_MAX:
        how = "NIXL's progress thread spins (one core per engine): leave each engine a core more than it computes with"
        return fail(name, check, seen, fix=how)
    rest = "" if whole else " (its engine core shows only on its own machine: run this there)"
    return ok(name, check, seen + rest)


def _model(facts: EngineFacts) -> Finding:
    wanted, served = facts.target.model, ", ".join(facts.models)
    if wanted and wanted not in facts.models:
        return fail(facts.name, "model", f"serves {served}, not {wanted}", fix="correct the model in the broker's file")
    return ok(facts.name, "model", f"serves {served}, up to {facts.max_model_len:,} tokens")


def _version(facts: EngineFacts) -> Finding:
    found = re.match(r"(\d+)\.(\d+)", facts.version)
    if found is None:
        return note(facts.name, "version", f"version not told: /version says {facts.version!r}")
    if tuple(map(int, found.groups())) < OLDEST_VERSION:
        return fail(facts.name, "version", f"vLLM {facts.version}", fix=f"upgrade; measured with {MEASURED_VERSION}")
    if not facts.version.startswith(f"{MEASURED_VERSION}."):
        return note(facts.name, "version", f"vLLM {facts.version}; ConServe was measured with {MEASURED_VERSION}")
    return ok(facts.name, "version", f"vLLM {facts.version}")


def _connector(facts: EngineFacts) -> Finding:
    if facts.has_connector:
        named = (facts.guard or {}).get("connector") or "NIXL, by its metrics"
        return ok(facts.name, "connector", f"KV connector: {named}")
    kv_role = {"prefiller": "producer", "decoder": "consumer"}.get(facts.role, "both")
    if facts.role in ("prefiller", "decoder"):
        return fail(facts.name, "connector", "no KV connector: it can move no KV", fix=CONNECTOR_FIX % kv_role)
    return note(
        facts.name, "connector", "no KV connector: it computes every prompt itself", fix=CONNECTOR_FIX % kv_role
    )


def _role(facts: EngineFacts) -> Finding:
    given = facts.target.role
    if facts.guard is None or not facts.guard.get("role"):
        return note(facts.name, "role", (f"taken for a {given}; " if given else "") + f"KV role {NOT_TOLD}")
    if given and facts.role != given and "both" not in (facts.role, given):
        detail = f"it runs as {facts.role}, but is named as {given}"
        return fail(facts.name, "role", detail, fix="correct kv_role, or the role it is named with")
    return ok(facts.name, "role", f"{facts.role}, as its guard says")


def _guard(facts: EngineFacts) -> Finding:
    """Whether somebody keeps strangers from steering its cache, and under which name."""
    if facts.guard is None:
        detail = (
            "no guard: whoever reaches this engine can end it, or make it answer wrong text, with kv_transfer_params"
        )
        return note(facts.name, "guard", detail, fix="start it with --middleware conserve_vllm.LeaseGuard")
    named = facts.told("engine_id")
    known = facts.target.engine_id
    if known and named != known:
        detail = f"its guard takes it for {named!r}, the broker for {known!r}: it refuses every lease"
        return fail(facts.name, "guard", detail, fix="correct CONSERVE_GUARD_ENGINE_ID, or the id in the broker's file")
    return ok(facts.name, "guard", "guarded: transfers need a lease")


def _prefix_caching(facts: EngineFacts) -> Finding:
    told = facts.page.labels("vllm:cache_config_info").get("enable_prefix_caching")
    if told is None:
        return note(facts.name, "prefix_caching", "prefix caching not told: its metrics have no vllm:cache_config_info")
    if told.lower() == "true":
        return ok(facts.name, "prefix_caching", f"prefix caching on, in blocks of {facts.block_size} tokens")
    detail = "prefix caching is off, so every turn computes its whole history"
    return fail(facts.name, "prefix_caching", detail, fix="start it without --no-enable-prefix-caching")


def _failure_policy(facts: EngineFacts) -> Finding:
    check, policy = "kv_load_failure_policy", facts.told("kv_load_failure_policy")
    want = 'set "kv_load_failure_policy":"recompute" in its --kv-transfer-config'
    if policy is None:
        return note(facts.name, check, f"kv_load_failure_policy {NOT_TOLD}", fix=f"make sure to {want}")
    if policy == "recompute":
        return ok(facts.name, check, "a transfer that fails is recomputed")
    return fail(facts.name, check, f"a transfer that fails is an HTTP 500 (kv_load_failure_policy={policy})", fix=want)


def _lease(facts: EngineFacts) -> Finding:
    check, told_ms = "kv_lease_duration", facts.told("kv_lease_duration_ms")
    seconds = told_ms / 1000 if isinstance(told_ms, int) and told_ms > 0 else None
    if seconds is None:
        return note(facts.name, check, f"kv_lease_duration {NOT_TOLD}; vLLM's default is 30 s")
    if seconds < LEASE_S_MIN and facts.role != "decoder":
        detail = f"keeps a prefilled prompt for {seconds:g} s only"
        how = f'set "kv_lease_duration" to {LEASE_S_MIN} or more, or a smaller Timeouts(transfer_s=...) in every SDK'
        return fail(facts.name, check, detail, fix=how)
    return ok(facts.name, check, f"keeps blocks for {seconds:g} s")

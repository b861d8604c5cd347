"""How an engine keeps KV between turns: holds by lease, and a tier in host memory. Only a guard tells of either."""

from __future__ import annotations

from collections.abc import Iterator

from conserve_sdk.doctor._finding import Finding, fail, note, ok
from conserve_sdk.doctor._look import EngineFacts

__all__ = ["check_kept"]


def check_kept(facts: EngineFacts) -> Iterator[Finding]:
    """Judge what an engine with a guard says about holds and host tier; nothing is said of what it does not tell."""
    if "leased_holds" in (facts.guard or {}):
        yield _holds(facts)
    if "host_tier_tokens" in (facts.guard or {}):
        yield from _host_tier(facts)


def _holds(facts: EngineFacts) -> Finding:
    check = "holds"
    if facts.told("leased_holds"):
        if facts.role == "prefiller":
            how = "leave out kv_connector_module_path"
            return note(facts.name, check, "holds by lease on a prefiller, which keeps no conversations", fix=how)
        return ok(facts.name, check, "holds belong to leases: each has its own time, and ends with its lease")
    if facts.role == "prefiller" or not facts.has_connector:
        return ok(facts.name, check, "holds nothing between turns")
    detail = "holds end by themselves only: each turn of a conversation leaves its own behind"
    return note(facts.name, check, detail, fix="start it with `conserve worker --leased-holds`")


def _host_tier(facts: EngineFacts) -> Iterator[Finding]:
    check, told = "host_tier", facts.told("host_tier_tokens")
    known = facts.target.host_tier_tokens
    if told is None:
        detail = "a host tier of unknown size"
        yield note(facts.name, check, detail, fix="give it --kv-cache-memory-bytes, from which its size follows")
    elif told == 0 and known:
        detail = f"no host tier, but the broker counts on {known:,} tokens and lets in more than the engine can keep"
        yield fail(
            facts.name, check, detail, fix="start it with --host-tier-gib, or take host_tier_tokens out of its entry"
        )
    elif told and facts.role == "prefiller":
        detail = f"a host tier of {told:,} tokens on a prefiller, which keeps no conversations"
        yield note(facts.name, check, detail, fix="leave out the OffloadingConnector")
    elif told:
        yield ok(facts.name, check, f"a host tier of {told:,} tokens")
    if (told is None or told) and facts.target.from_broker and not known and facts.role != "prefiller":
        detail = "the broker does not know of the host tier: idle leases count as if they filled the engine's cache"
        how = f"set host_tier_tokens = {told or 'its size'} in its entry; a worker that registers says it by itself"
        yield note(facts.name, "host_tier_counted", detail, fix=how)

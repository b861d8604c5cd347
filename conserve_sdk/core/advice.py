"""What a running fleet's figures call for: which preset, how many prefillers, and when not to disaggregate at all.

Pure: reads what the broker has observed of one model and says it in words. Thresholds are those of the placement study
(docs/placement.md): with few engines a dedicated prefiller costs the fleet its idle share over the number of engines,
and past KV saturation nothing makes up for the room that it takes from decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conserve_sdk.core.figures import GrantFigures
from conserve_sdk.core.settings import AFFINITY, DEFAULT, PlacementSettings
from conserve_sdk.core.units import MILLION, ModelName, Ms, Ppm
from conserve_sdk.core.views import EngineView
from conserve_sdk.core.vocabulary import EngineState, Role

GRANTS_MIN = 32
"""Fewer grants say too little about waits and first turns."""
FEW_ENGINES = 4
SATURATED_PPM = Ppm(800_000)
"""Active KV over capacity above which decoders have no room to spare."""
LONG_WAIT_MS = Ms(10_000)
IDLE_PREFILL_PPM = Ppm(400_000)
"""Prefill work of the whole fleet, in engines, under which one engine of its own for it is mostly idle (GATE)."""
FULL_PREFILL_PPM = Ppm(700_000)
"""Prefill share to which a prefiller is filled by the advice, so that its queue stays short."""
TINY_TOKENS = DEFAULT.local_below_tokens
"""First turns below it are prefilled where they stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One observation and what follows from it; `code` is stable."""

    code: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What one model's figures call for.

    Attributes:
        preset: the preset to use.
        prefillers, decoders: how to divide the engines that are there now; 0 prefillers: do not disaggregate.
        sure: False while too few grants or engines were seen.
        engines_ready, prefillers_now: engines in use, and those of them that are prefillers.
        kv_active_ppm: active KV of decoders over their capacity.
        prefill_work_ppm: prefill shares of all engines together, in millionths of an engine.
        grants: see `GrantFigures`.
        waiting: requests that wait now.
    """

    model: ModelName
    preset: str
    prefillers: int
    decoders: int
    sure: bool
    engines_ready: int
    prefillers_now: int
    kv_active_ppm: Ppm
    prefill_work_ppm: Ppm
    grants: GrantFigures
    waiting: int
    findings: tuple[Finding, ...]


def advise(
    model: ModelName, engines: Sequence[EngineView], *, grants: GrantFigures, waiting: int, placement: PlacementSettings
) -> Advice:
    """Judge one model.

    Args:
        model: its name.
        engines: the engines configured for it.
        grants: waits and first turns of its last grants.
        waiting: requests that wait for it now.
        placement: what is in force.
    """
    ready = [view for view in engines if view.state is EngineState.READY]
    dedicated = [view for view in ready if view.spec.role is Role.PREFILLER]
    active_ppm = _active_ppm([view for view in ready if view.spec.role is not Role.PREFILLER])
    work_ppm = Ppm(sum(view.prefill_share_ppm for view in ready))
    findings = [
        *_doubts(ready, grants),
        *_against(ready, active_ppm, work_ppm, grants),
    ]
    split = not any(finding.code in _AGAINST for finding in findings) and len(ready) > 1
    prefillers = min(max(-(-work_ppm // FULL_PREFILL_PPM), 1), len(ready) - 1) if split else 0
    findings += [
        *_waits(grants, waiting),
        *_ratio(len(dedicated), prefillers),
        *_hosting(dedicated, placement),
        *_caches(ready, active_ppm),
    ]
    return Advice(
        model=model,
        preset=DEFAULT.name if prefillers else AFFINITY.name,
        prefillers=prefillers,
        decoders=len(ready) - prefillers,
        sure=not any(finding.code in _DOUBTS for finding in findings),
        engines_ready=len(ready),
        prefillers_now=len(dedicated),
        kv_active_ppm=active_ppm,
        prefill_work_ppm=work_ppm,
        grants=grants,
        waiting=waiting,
        findings=tuple(findings),
    )


_DOUBTS = frozenset({"no_engine", "few_grants"})
_AGAINST = frozenset({"one_engine", "kv_saturated", "idle_prefill", "tiny_first_turns"})


def _active_ppm(decoders: Sequence[EngineView]) -> Ppm:
    capacity = sum(view.kv_capacity_tokens for view in decoders)
    active = sum(max(view.kv_active_tokens, view.kv_used_tokens) for view in decoders)
    return Ppm(active * MILLION // capacity if capacity else 0)


def _doubts(ready: Sequence[EngineView], grants: GrantFigures) -> list[Finding]:
    findings = []
    if not ready:
        findings.append(Finding(code="no_engine", text="No engine is ready; see `conserve engines list`."))
    if grants.grants < GRANTS_MIN:
        text = f"Only {grants.grants} grants were seen since the start; ask again after {GRANTS_MIN}."
        findings.append(Finding(code="few_grants", text=text))
    return findings


def _against(ready: Sequence[EngineView], active_ppm: Ppm, work_ppm: Ppm, grants: GrantFigures) -> list[Finding]:
    """Reasons not to disaggregate."""
    findings = []
    if len(ready) == 1:
        findings.append(Finding(code="one_engine", text="One engine serves everything; there is nothing to divide."))
    few = 1 < len(ready) <= FEW_ENGINES
    if few and active_ppm >= SATURATED_PPM:
        text = (
            f"Active KV fills {_percent(active_ppm)} of the decoders, and {len(ready)} engines are few: a prefiller of "
            "its own takes room that decoding needs. Use no prefillers, or add engines."
        )
        findings.append(Finding(code="kv_saturated", text=text))
    if few and work_ppm < IDLE_PREFILL_PPM:
        text = (
            f"All prefill work together fills {_percent(work_ppm)} of one engine: a prefiller of its own would cost "
            f"{_percent((MILLION - work_ppm) // len(ready))} of the fleet in idle time. Use no prefillers."
        )
        findings.append(Finding(code="idle_prefill", text=text))
    if grants.grants >= GRANTS_MIN and grants.first_turn_p50_tokens < TINY_TOKENS:
        text = (
            f"Half of the first turns bring fewer than {grants.first_turn_p50_tokens + 1} uncached tokens: they are "
            "prefilled where they stay. Use no prefillers."
        )
        findings.append(Finding(code="tiny_first_turns", text=text))
    return findings


def _waits(grants: GrantFigures, waiting: int) -> list[Finding]:
    if grants.wait_p95_ms < LONG_WAIT_MS:
        return []
    text = (
        f"5 % of the conversations waited {grants.wait_p95_ms / 1000:.1f} s or longer for room, and {waiting} wait "
        "now: add decoders, or a host KV tier; at this load no placement keeps the first token prompt."
    )
    return [Finding(code="long_waits", text=text)]


def _ratio(now: int, prefillers: int) -> list[Finding]:
    if now == prefillers:
        return []
    change = "more" if prefillers > now else "fewer"
    text = (
        f"{now} of the engines are prefillers; the work seen calls for {prefillers}, {abs(prefillers - now)} {change}."
    )
    return [Finding(code="ratio", text=text)]


def _hosting(dedicated: Sequence[EngineView], placement: PlacementSettings) -> list[Finding]:
    idle = [view for view in dedicated if view.prefill_share_ppm <= placement.host_gate_ppm]
    if not idle or placement.prefiller_hosts is DEFAULT.prefiller_hosts:
        return []
    names = ", ".join(f"{view.engine_id} ({_percent(view.prefill_share_ppm)} busy)" for view in idle)
    text = f'Prefillers have time to spare: {names}. Let them host with prefiller_hosts = "auto".'
    return [Finding(code="prefiller_idle", text=text)]


def _caches(ready: Sequence[EngineView], active_ppm: Ppm) -> list[Finding]:
    findings = []
    lost = [view for view in ready if view.lost_caches]
    if lost:
        names = ", ".join(f"{view.engine_id} ({view.lost_caches})" for view in lost)
        text = f"Follow-up turns found their KV evicted: {names}. A host KV tier or a longer hold_ms keeps it."
        findings.append(Finding(code="caches_lost", text=text))
    hosts = [view for view in ready if view.leases]
    leases, busy = sum(view.leases for view in hosts), sum(view.busy for view in hosts)
    untiered = any(not view.spec.host_tier_tokens for view in hosts)
    if untiered and 2 * busy < leases and active_ppm >= SATURATED_PPM:
        text = (
            f"{leases - busy} of {leases} leases are idle and hold the decoders' KV all the same: with a host KV tier "
            "(host_tier_tokens) they make room."
        )
        findings.append(Finding(code="idle_leases", text=text))
    return findings


def _percent(ppm: int) -> str:
    return f"{ppm / 10_000:.0f} %"

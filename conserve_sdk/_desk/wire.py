"""From the core's dataclasses to the wire models; nothing is decided here."""

from __future__ import annotations

from functools import lru_cache

from conserve_sdk.core import Advice, Broker, EngineView
from conserve_sdk.core.lease import EngineBinding, Lease
from conserve_sdk.core.receipt import Receipt
from conserve_sdk.core.units import EngineId, Ms
from conserve_sdk.protocol import (
    AdviceInfo,
    Binding,
    DecisionInfo,
    EngineInfo,
    FindingInfo,
    FleetInfo,
    LeaseExplanation,
    LeaseGrant,
    LeaseSummary,
    ModelAdvice,
)

RENEWALS_PER_TTL = 3
"""Clients renew at a third of the TTL, so that two lost renewals in a row cost nothing."""


@lru_cache(maxsize=4_096)
def binding_info(binding: EngineBinding) -> Binding:
    """One engine as a lease names it: there are few engines and many leases."""
    return Binding.model_validate(binding, from_attributes=True)


def decision_info(receipt: Receipt) -> DecisionInfo:
    """A placement's receipt, whole. Read by pydantic, field by field of the same name."""
    return DecisionInfo.model_validate(receipt, from_attributes=True)


def decision_summary(receipt: Receipt) -> DecisionInfo:
    """What a grant says of its receipt: which rule fired, not what was read of the other engines."""
    return DecisionInfo(
        preset=receipt.preset,
        rule=receipt.rule,
        prefill_rule=receipt.prefill_rule,
        need_tokens=receipt.need_tokens,
        waited_ms=receipt.waited_ms,
    )


def lease_grant(lease: Lease, *, token: str, now_ms: Ms, reused: bool) -> LeaseGrant:
    """A live lease as its holder gets it."""
    return LeaseGrant(
        lease_id=lease.lease_id,
        epoch=lease.epoch,
        tenant=lease.key.tenant,
        conversation_id=lease.key.conversation_id,
        lineage=lease.key.lineage,
        model=lease.key.model,
        mode=lease.mode.value,
        prefiller=None if lease.prefiller is None else binding_info(lease.prefiller),
        decoder=binding_info(lease.decoder),
        ttl_ms=lease.ttl_ms,
        expires_in_ms=lease.expires_at_ms - now_ms,
        renew_after_ms=lease.ttl_ms // RENEWALS_PER_TTL,
        hold_ms=lease.hold_ms,
        append_threshold_tokens=lease.append_threshold_tokens,
        supersedes=lease.supersedes,
        migrations=lease.migrations,
        turns=lease.turns,
        activity=lease.activity.value,
        reused=reused,
        token=token,
        decision=decision_summary(lease.receipt),
    )


def explanation(lease: Lease, core: Broker, *, now_ms: Ms) -> LeaseExplanation:
    """A live lease as an operator reads it."""
    views = {view.spec.engine_id: engine_info(view, now_ms=now_ms) for view in core.engines()}
    return LeaseExplanation(
        lease_id=lease.lease_id,
        epoch=lease.epoch,
        tenant=lease.key.tenant,
        conversation_id=lease.key.conversation_id,
        lineage=lease.key.lineage,
        model=lease.key.model,
        mode=lease.mode.value,
        prefiller=None if lease.prefiller is None else binding_info(lease.prefiller),
        decoder=binding_info(lease.decoder),
        granted_ago_ms=now_ms - lease.granted_at_ms,
        expires_in_ms=lease.expires_at_ms - now_ms,
        ttl_ms=lease.ttl_ms,
        hold_ms=lease.hold_ms,
        ledger_tokens=lease.ledger_tokens,
        activity=lease.activity.value,
        activity_for_ms=now_ms - lease.activity_since_ms,
        turns=lease.turns,
        migrations=lease.migrations,
        supersedes=lease.supersedes,
        decision=decision_info(lease.receipt),
        decoder_now=views.get(lease.decoder.engine_id),
        prefiller_now=views.get(lease.prefiller.engine_id if lease.prefiller else EngineId("")),
    )


def lease_summary(lease: Lease, *, now_ms: Ms) -> LeaseSummary:
    """A live lease as one line of a list."""
    return LeaseSummary(
        lease_id=lease.lease_id,
        epoch=lease.epoch,
        tenant=lease.key.tenant,
        conversation_id=lease.key.conversation_id,
        lineage=lease.key.lineage,
        model=lease.key.model,
        mode=lease.mode.value,
        prefiller=None if lease.prefiller is None else lease.prefiller.engine_id,
        decoder=lease.decoder.engine_id,
        state=lease.activity.value,
        state_for_ms=now_ms - lease.activity_since_ms,
        granted_ago_ms=now_ms - lease.granted_at_ms,
        expires_in_ms=lease.expires_at_ms - now_ms,
        ledger_tokens=lease.ledger_tokens,
        turns=lease.turns,
        migrations=lease.migrations,
        rule=lease.receipt.rule,
    )


def engine_info(view: EngineView, *, now_ms: Ms) -> EngineInfo:
    """One engine as the broker sees it."""
    return EngineInfo(
        engine_id=view.spec.engine_id,
        url=view.spec.url,
        role=view.spec.role.value,
        model=view.spec.model,
        state=view.state.value,
        detail=view.detail,
        incarnation=view.incarnation,
        transfer_group=view.spec.transfer_group,
        kv_capacity_tokens=view.kv_capacity_tokens,
        kv_used_tokens=view.kv_used_tokens,
        kv_leased_tokens=view.kv_leased_tokens,
        leases=view.leases,
        running=view.running,
        waiting=view.waiting,
        backlog_tokens=view.backlog_tokens,
        prefill_rate_tokens_per_s=view.rate_tokens_per_s,
        observed_ago_ms=None if view.observed_at_ms is None else now_ms - view.observed_at_ms,
        block_size_tokens=view.block_size_tokens,
        max_model_len_tokens=view.max_model_len_tokens,
        draining=view.draining,
        kv_active_tokens=view.kv_active_tokens,
        host_tier_tokens=view.spec.host_tier_tokens,
        prefill_share_ppm=view.prefill_share_ppm,
        lost_caches=view.lost_caches,
        tier=view.spec.tier,
        busy=view.busy,
    )


def advice_info(core: Broker, *, preset: str) -> AdviceInfo:
    """What the figures of each model call for."""
    return AdviceInfo(preset=preset, models=tuple(_model_advice(advice) for advice in core.advice()))


def _model_advice(advice: Advice) -> ModelAdvice:
    return ModelAdvice(
        model=advice.model,
        preset=advice.preset,
        prefillers=advice.prefillers,
        decoders=advice.decoders,
        sure=advice.sure,
        engines_ready=advice.engines_ready,
        prefillers_now=advice.prefillers_now,
        kv_active_ppm=advice.kv_active_ppm,
        prefill_work_ppm=advice.prefill_work_ppm,
        grants=advice.grants.grants,
        wait_p95_ms=advice.grants.wait_p95_ms,
        first_turn_p50_tokens=advice.grants.first_turn_p50_tokens,
        waiting=advice.waiting,
        findings=tuple(FindingInfo(code=finding.code, text=finding.text) for finding in advice.findings),
    )


def fleet_info(core: Broker, *, preset: str, now_ms: Ms) -> FleetInfo:
    """The fleet and the broker's main counters."""
    return FleetInfo(
        preset=preset,
        engines=tuple(engine_info(view, now_ms=now_ms) for view in core.engines()),
        leases=core.lease_count(),
        waiting_requests=core.waiting(),
        migrations_total=core.counters.migrations,
        grants_total=core.counters.granted,
    )

"""Many live leases without asking for each: some that the production placement granted, again and again renamed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conserve_broker.journal import Journal
from conserve_sdk.core import (
    Broker,
    BrokerSettings,
    EngineConfigured,
    EngineId,
    EngineObserved,
    EngineSpec,
    Granted,
    Incarnation,
    LeaseId,
    LeaseKey,
    LeaseRequested,
    ModelName,
    Ms,
    Role,
    TenantId,
    Tokens,
    TransferGroup,
)
from conserve_sdk.core.decisions import LeaseStored
from conserve_sdk.core.lease import Lease
from conserve_sdk.core.units import ConversationId, LineageId, RequestId

CAPACITY_TOKENS = 1_000_000_000
"""Of each engine, so that admission never ends a measurement."""
_PATTERNS = 500
_GROUP = 2_000
_TTL_MS = 3_600_000


def specs_of(engines: Sequence[Mapping[str, Any]]) -> list[EngineSpec]:
    """Entries of a broker's configuration as the core takes them."""
    return [
        EngineSpec(
            engine_id=EngineId(engine["id"]),
            url=engine["url"],
            role=Role(engine["role"]),
            model=ModelName(engine["model"]),
            transfer_group=TransferGroup(engine["transfer_group"]),
            kv_capacity_tokens=Tokens(CAPACITY_TOKENS),
        )
        for engine in engines
    ]


def leases_on(engines: Sequence[Mapping[str, Any]], incarnations: Mapping[str, str], *, count: int) -> Iterator[Lease]:
    """Leases as the default placement grants them, receipts and all, on these incarnations of the engines."""
    patterns = _granted(engines, incarnations)
    for number in range(count):
        pattern = patterns[number % len(patterns)]
        yield replace(
            pattern,
            lease_id=LeaseId(f"lease-{number:024x}"),
            key=replace(pattern.key, conversation_id=ConversationId(f"conversation-{number:012d}")),
        )


def _granted(engines: Sequence[Mapping[str, Any]], incarnations: Mapping[str, str]) -> list[Lease]:
    core = Broker(BrokerSettings(ttl_ms=Ms(_TTL_MS)))
    now_ms = Ms(time.time_ns() // 1_000_000)
    for spec in specs_of(engines):
        core.apply(EngineConfigured(now_ms=now_ms, spec=spec))
        core.apply(
            EngineObserved(
                now_ms=now_ms,
                engine_id=spec.engine_id,
                incarnation=Incarnation(incarnations[spec.engine_id]),
                models=(spec.model,),
                kv_capacity_tokens=spec.kv_capacity_tokens,
                kv_used_tokens=Tokens(0),
                block_size_tokens=Tokens(16),
                max_model_len_tokens=Tokens(0),
                running=0,
                waiting=0,
            )
        )
    for number in range(_PATTERNS):
        asked = LeaseRequested(
            now_ms=now_ms,
            request_id=RequestId(f"{number}"),
            lease_id=LeaseId(f"{number}"),
            key=LeaseKey(
                tenant=TenantId("default"),
                conversation_id=ConversationId(f"{number}"),
                lineage=LineageId("main"),
                model=ModelName(engines[0]["model"]),
            ),
            first_turn_input_tokens=Tokens(500 + 10 * number),
            first_turn_input_bytes=0,
            deadline_at_ms=now_ms,
        )
        assert any(isinstance(each, Granted) for each in core.apply(asked)), "there is room for everybody"
    return list(core.leases())


def write_journal(path: Path, leases: Iterator[Lease]) -> None:
    """Put the leases into a new journal file, as a broker would have."""
    journal = Journal.open(path)
    try:
        group: list[LeaseStored] = []
        for lease in leases:
            group.append(LeaseStored(lease=lease, fresh=True))
            if len(group) == _GROUP:
                journal.submit(group).result()
                group = []
        journal.submit(group).result()
    finally:
        journal.close()

"""Grants as a broker would give them."""

from conserve_sdk._registry import LeaseRef
from conserve_sdk.core.units import ConversationId, LineageId, ModelName
from conserve_sdk.protocol import Binding, DecisionInfo, LeaseGrant

REF = LeaseRef(ConversationId("c"), LineageId("l"), ModelName("m"))


def ref(conversation: str = "c", lineage: str = "l") -> LeaseRef:
    return LeaseRef(ConversationId(conversation), LineageId(lineage), ModelName("m"))


def grant(lease_id: str = "L1", **changes) -> LeaseGrant:
    fields = {
        "lease_id": lease_id,
        "epoch": 1,
        "tenant": "default",
        "conversation_id": "c",
        "lineage": "l",
        "model": "m",
        "mode": "migrate",
        "prefiller": Binding(engine_id="p0", url="http://p0", incarnation="1"),
        "decoder": Binding(engine_id="d0", url="http://d0", incarnation="1"),
        "ttl_ms": 60_000,
        "expires_in_ms": 60_000,
        "renew_after_ms": 20_000,
        "hold_ms": 10_000,
        "append_threshold_tokens": 0,
        "supersedes": None,
        "token": f"token-{lease_id}",
        "decision": DecisionInfo(preset="default", rule="r", prefill_rule="p", need_tokens=1, waited_ms=0),
    }
    return LeaseGrant(**{**fields, **changes})

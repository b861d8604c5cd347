"""Views of engines, and what placement makes of them."""

from typing import Any

from conserve_sdk.core import (
    PAPER,
    BrokerSettings,
    EngineState,
    EngineView,
    Incarnation,
    Ms,
    PlacementSettings,
    Role,
    Tokens,
)
from conserve_sdk.core.placement import NoPlacement, Placement, Wanted, place
from tests.core.world import M, spec


def view(engine_id: str, role: Role = Role.DECODER, **changes: Any) -> EngineView:
    values: dict[str, Any] = {
        "spec": spec(engine_id, role),
        "state": EngineState.READY,
        "incarnation": Incarnation("i1"),
        "observed_at_ms": Ms(0),
        "kv_capacity_tokens": Tokens(100_000),
        "rate_tokens_per_s": 10_000,
        "block_size_tokens": Tokens(16),
    }
    return EngineView(**{**values, **changes})


def leased(engine_id: str, tokens: int, **changes: Any) -> EngineView:
    return view(engine_id, kv_leased_tokens=Tokens(tokens), kv_active_tokens=Tokens(tokens), **changes)


def outcome(
    views: list[EngineView], *, preset: PlacementSettings = PAPER, tokens: int = 1_000, **wanted: Any
) -> Placement | NoPlacement:
    ordered = sorted(views, key=lambda each: each.engine_id)
    request = Wanted(model=M, input_tokens=Tokens(tokens), **wanted)
    return place(request, ordered, settings=BrokerSettings(placement=preset), now_ms=Ms(0))


def placed(views: list[EngineView], **options: Any) -> Placement:
    found = outcome(views, **options)
    assert isinstance(found, Placement)
    return found


def decoder(views: list[EngineView], **options: Any) -> str:
    return placed(views, **options).decoder.engine_id


def prefill(views: list[EngineView], **options: Any) -> tuple[str | None, str]:
    found = placed(views, **options)
    return None if found.prefiller is None else found.prefiller.engine_id, found.receipt.prefill_rule

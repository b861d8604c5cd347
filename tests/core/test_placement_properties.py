"""Placement on any fleet: what it promises, and what must not matter."""

from dataclasses import replace
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from conserve_sdk.core import (
    AFFINITY,
    DEFAULT,
    PAPER,
    BrokerSettings,
    EngineState,
    EngineView,
    Ms,
    PlacementSettings,
    Role,
    Tokens,
    TransferGroup,
)
from conserve_sdk.core.placement import NoPlacement, Placement
from tests.core.placing import outcome, view
from tests.core.world import World, spec

ROLES = st.sampled_from([Role.DECODER, Role.DECODER, Role.PREFILLER, Role.BOTH])


@st.composite
def fleets(draw: st.DrawFn) -> list[EngineView]:
    # Small numbers make ties and full decoders likely.
    count = draw(st.integers(1, 6))
    return [
        view(
            f"e{index}",
            spec=spec(
                f"e{index}", draw(ROLES), transfer_group=TransferGroup(draw(st.sampled_from(["g", "g", "h", ""])))
            ),
            state=draw(st.sampled_from([EngineState.READY] * 4 + [EngineState.DRAINING, EngineState.GONE])),
            observed_at_ms=Ms(-draw(st.sampled_from([0, 0, 10_000, 10_001]))),
            kv_capacity_tokens=Tokens(draw(st.sampled_from([0, 50, 100, 100, 200]))),
            kv_leased_tokens=Tokens(draw(st.integers(0, 110))),
            kv_used_tokens=Tokens(draw(st.integers(0, 110))),
            backlog_tokens=Tokens(draw(st.integers(0, 3))),
            busy=draw(st.integers(0, 3)),
            running=draw(st.integers(0, 3)),
            rate_tokens_per_s=draw(st.sampled_from([1, 10, 10_000])),
            block_size_tokens=Tokens(draw(st.sampled_from([16, 16, 32]))),
            max_model_len_tokens=Tokens(draw(st.sampled_from([0, 40, 1_000]))),
        )
        for index in range(count)
    ]


PRESET = st.sampled_from(
    [PAPER, AFFINITY, DEFAULT, replace(DEFAULT, local_below_tokens=Tokens(0), transfer_overhead_us=0)]
)
WANTED = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, 60),
        "exact": st.booleans(),
        "hint": st.sampled_from([None, "e0", "e1", "nobody"]),
        "failed_engine_id": st.sampled_from([None, "e0", "e1"]),
    }
)


def gist(found: Placement | NoPlacement) -> object:
    if isinstance(found, NoPlacement):
        return found.reason, found.hopeless
    return found.decoder.engine_id, found.prefiller and found.prefiller.engine_id, found.receipt


@given(fleets(), PRESET, WANTED)
def test_a_placement_keeps_every_promise(
    views: list[EngineView], preset: PlacementSettings, wanted: dict[str, Any]
) -> None:
    found = outcome(views, preset=preset, **wanted)
    assume(isinstance(found, Placement))
    assert isinstance(found, Placement)
    chosen = [view for view in (found.decoder, found.prefiller) if view is not None]
    for each in chosen:
        assert each.state is EngineState.READY
        assert each.observed_at_ms is not None
        assert each.observed_at_ms >= -10_000
        assert each.engine_id != wanted["failed_engine_id"]
    host = found.decoder
    assert host.spec.role is not Role.PREFILLER
    occupied = max(host.kv_leased_tokens, host.kv_used_tokens)
    assert (occupied + found.need_tokens) * 1_000_000 <= preset.kv_watermark_ppm * host.kv_capacity_tokens
    assert host.max_model_len_tokens == 0 or found.need_tokens <= host.max_model_len_tokens
    if found.prefiller is not None:
        assert preset is not AFFINITY
        assert found.prefiller.spec.role is not Role.DECODER
        assert found.prefiller.engine_id != host.engine_id
        assert found.prefiller.spec.transfer_group == host.spec.transfer_group != ""
        assert found.prefiller.block_size_tokens == host.block_size_tokens


@given(fleets(), PRESET, WANTED, st.randoms(use_true_random=False))
def test_the_order_in_which_engines_came_does_not_matter(
    views: list[EngineView], preset: PlacementSettings, wanted: dict[str, Any], random: Any
) -> None:
    """Invariant 10, through the broker: configured and observed in another order, the same lease is granted."""
    shuffled = list(views)
    random.shuffle(shuffled)

    def lease_of(order: list[EngineView]) -> object:
        world = World(fleet=[], settings=BrokerSettings(placement=preset))
        for each in order:
            world.configure(
                replace(each.spec, transfer_group=TransferGroup(each.spec.transfer_group + str(each.block_size_tokens)))
            )
            world.observe(
                each.engine_id,
                kv_capacity_tokens=each.kv_capacity_tokens,
                kv_used_tokens=each.kv_used_tokens,
                block_size_tokens=each.block_size_tokens,
                max_model_len_tokens=each.max_model_len_tokens,
                running=each.running,
            )
        return world.request("c", wanted["tokens"], hint=wanted["hint"])

    assert lease_of(views) == lease_of(shuffled)


@given(fleets(), PRESET, WANTED, st.integers(0, 5), st.integers(1, 50), st.booleans())
def test_raising_an_occupancy_never_makes_a_decoder_chosen(
    views: list[EngineView], preset: PlacementSettings, wanted: dict[str, Any], index: int, more: int, ledger: bool
) -> None:
    """Invariant 10, second half."""
    assume(index < len(views))
    before = outcome(views, preset=preset, **wanted)
    raised = views[index]
    assume(not (isinstance(before, Placement) and before.decoder is raised))
    field = "kv_leased_tokens" if ledger else "kv_used_tokens"
    fuller = replace(raised, **{field: getattr(raised, field) + more})
    after = outcome([*views[:index], fuller, *views[index + 1 :]], preset=preset, **wanted)
    assert isinstance(after, NoPlacement) or after.decoder.engine_id != raised.engine_id


@given(fleets(), WANTED, st.integers(2, 9))
def test_scaling_all_sizes_keeps_the_decoder(views: list[EngineView], wanted: dict[str, Any], factor: int) -> None:
    def scaled(each: EngineView) -> EngineView:
        sizes = ("kv_capacity_tokens", "kv_leased_tokens", "kv_used_tokens", "max_model_len_tokens")
        changes: dict[str, Any] = {name: factor * getattr(each, name) for name in sizes}
        return replace(each, **changes)

    before = outcome(views, preset=PAPER, **wanted)
    after = outcome([scaled(each) for each in views], preset=PAPER, **{**wanted, "tokens": factor * wanted["tokens"]})
    assert type(before) is type(after)
    if isinstance(before, Placement) and isinstance(after, Placement):
        assert before.decoder.engine_id == after.decoder.engine_id

"""The pure engine model: batching, prefix cache, fetches, holds, preemption."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conserve_lab.engine_model import (
    EngineModel,
    EngineModelConfig,
    EngineRequest,
    PromptSources,
    StepCost,
    TransferCost,
    TransferLink,
)
from conserve_lab.hardware import PowerModel

COST = StepCost(base_us=1000, decode_us_per_sequence=10, decode_ns_per_context_token=0, prefill_tokens_per_s=1_000_000)


def build(**changes: int) -> EngineModel:
    settings: dict[str, int] = {"block_size": 4, "kv_blocks": 64, "max_num_batched_tokens": 16} | changes
    return EngineModel(EngineModelConfig(**settings, cost=COST))


def request(
    name: str,
    prompt: int,
    output: int = 1,
    *,
    family: int = 0,
    pull: bool = False,
    hold: bool = False,
    priority: int = 0,
) -> EngineRequest:
    keys = [family * 1000 + index for index in range((prompt + output) // 4)]
    return EngineRequest(
        request_id=name,
        prompt_tokens=prompt,
        output_tokens=output,
        block_keys=keys,
        pull=pull,
        hold=hold,
        priority=priority,
    )


def finish(model: EngineModel, now_us: int = 0, *, ended: list[str] | None = None) -> dict[str, PromptSources]:
    """Step until nothing happens and return where each prompt came from; `ended` takes the order of endings."""
    sources: dict[str, PromptSources] = {}
    while not (result := model.step(now_us)).idle:
        model.check()
        now_us += result.duration_us
        for item in result.progress:
            if item.sources is not None:
                sources[item.request_id] = item.sources
            if item.finished and ended is not None:
                ended.append(item.request_id)
    return sources


def test_a_long_prompt_is_prefilled_in_chunks_and_costs_what_the_cost_model_says() -> None:
    model = build()
    model.submit(request("a", 40, 2))
    steps = [model.step(0) for _ in range(4)]
    assert [step.prefill_tokens for step in steps] == [16, 16, 8, 0]
    assert [step.duration_us for step in steps] == [1016, 1016, 1008, 1010]
    assert [len(step.progress) for step in steps] == [0, 0, 1, 1]
    assert steps[2].progress[0].sources == PromptSources(40, 0, 0)
    assert steps[3].progress[0].finished
    assert model.pool.used == 0


def test_decodes_go_before_prefill_and_share_the_step() -> None:
    model = build()
    model.submit(request("a", 4, 5, family=1))
    model.step(0)
    model.submit(request("b", 40, 1, family=2))
    result = model.step(0)
    assert (result.decodes, result.prefill_tokens) == (1, 15)
    assert result.duration_us == 1000 + 10 + 15


def test_a_decode_is_never_left_out_for_prefills() -> None:
    model = build(max_num_batched_tokens=8, long_prefill_token_threshold=4)
    model.submit(request("long", 60, family=1))
    model.submit(request("short", 4, 6, family=2))
    model.submit(request("other", 60, family=3))
    assert model.step(0).progress[0].request_id == "short"
    steps = [model.step(0) for _ in range(5)]
    assert [step.decodes for step in steps] == [1] * 5
    assert [step.prefill_tokens for step in steps] == [7] * 5
    assert steps[-1].progress[-1].finished


def test_long_prefill_threshold_caps_one_request_and_leaves_room_for_another() -> None:
    model = build(long_prefill_token_threshold=10)
    model.submit(request("a", 40, family=1))
    model.submit(request("b", 40, family=2))
    assert model.step(0).prefill_tokens == 16
    assert model.running == 2


def test_a_follow_up_finds_prompt_and_answer_in_the_prefix_cache() -> None:
    model = build()
    model.submit(request("a", 10, 7))
    finish(model)
    model.submit(request("b", 30, 1))
    # 10 + 7 tokens, the last of which was never computed: 16 tokens, four full blocks.
    assert finish(model)["b"] == PromptSources(14, 16, 0)
    assert model.counters.prefix_hits == 16
    assert model.counters.prompt_tokens == 40


def test_at_least_the_last_prompt_token_is_computed() -> None:
    model = build()
    model.submit(request("a", 8))
    finish(model)
    model.submit(request("b", 8))
    assert finish(model)["b"] == PromptSources(4, 4, 0)


def test_the_least_recently_used_prefix_is_evicted_tail_first() -> None:
    model = build(kv_blocks=8)
    for name, family in (("a", 1), ("b", 2)):
        model.submit(request(name, 16, family=family))
        finish(model)
    model.submit(request("c", 12, family=3))
    finish(model)
    model.submit(request("b2", 16, family=2))
    assert finish(model)["b2"].local_cache_hit == 12
    model.submit(request("a2", 16, family=1))
    assert finish(model)["a2"].local_cache_hit == 0


def test_half_of_an_evicted_prefix_is_its_first_half() -> None:
    model = build(kv_blocks=8)
    for name, prompt, family in (("a", 16, 1), ("b", 16, 2), ("c", 8, 3)):
        model.submit(request(name, prompt, family=family))
        finish(model)
    model.submit(request("a2", 17, family=1))
    assert finish(model)["a2"].local_cache_hit == 8


def test_a_fetch_moves_only_missing_blocks_and_the_first_token_is_made_here() -> None:
    model = build()
    model.submit(request("warm", 8))
    finish(model)
    model.submit(request("pulled", 22, 3, pull=True))
    result = model.step(0)
    assert [(f.missing_tokens, f.missing_blocks) for f in result.fetches] == [(14, 4)]
    assert (model.fetching, model.waiting, model.running) == (1, 1, 0)
    assert model.step(0).idle
    assert model.fetch_finished("pulled", ok=True)
    first = model.step(0)
    assert first.prefill_tokens == 1
    assert first.progress[0].sources == PromptSources(0, 8, 14)
    finish(model)
    assert (model.counters.external_queries, model.counters.external_hits) == (14, 14)


def test_a_failed_fetch_is_recomputed_and_counted_as_local() -> None:
    model = build()
    model.submit(request("pulled", 22, 2, pull=True))
    model.step(0)
    assert model.fetch_finished("pulled", ok=False)
    assert finish(model)["pulled"] == PromptSources(22, 0, 0)
    assert not model.fetch_finished("pulled", ok=True)


def test_held_blocks_stay_until_released_or_expired() -> None:
    model = build(kv_lease_us=500, max_num_batched_tokens=64)
    for name, family in (("a", 1), ("b", 2)):
        model.submit(request(name, 9, family=family, hold=True))
    result = model.step(100)
    end = 100 + result.duration_us
    assert [len(item.held_blocks) for item in result.progress] == [3, 3]
    assert [item.computed_tokens for item in result.progress] == [9, 9]
    assert model.pool.used == 6
    assert model.holds.release("a")
    assert not model.holds.release("a")
    assert model.holds.next_expiry_us() == end + 500
    assert model.holds.expire(now_us=end + 499) == []
    assert model.holds.renew("b", until_us=end + 900)
    assert model.holds.expire(now_us=end + 899) == []
    assert model.holds.expire(now_us=end + 900) == ["b"]
    assert not model.holds.renew("b", until_us=10**9)
    assert model.pool.used == 0
    assert model.counters.holds_expired == 1
    assert model.holds.next_expiry_us() is None


def test_holds_make_the_next_request_wait_and_expiry_lets_it_in() -> None:
    model = build(kv_blocks=4, kv_lease_us=1000)
    model.submit(request("held", 12, family=1, hold=True))
    end = model.step(0).duration_us
    model.submit(request("next", 12, family=2))
    assert model.step(end).idle
    assert model.kv_usage_ppm == 750_000
    assert not model.step(end + 1000).idle


def test_out_of_blocks_preempts_the_youngest_which_is_recomputed() -> None:
    model = build(kv_blocks=8, max_num_batched_tokens=64)
    model.submit(request("old", 12, 12, family=1))
    model.submit(request("young", 12, 12, family=2))
    ended: list[str] = []
    sources = finish(model, ended=ended)
    assert ended == ["old", "young"]
    assert sources == {"old": PromptSources(12, 0, 0), "young": PromptSources(12, 0, 0)}
    assert model.counters.preemptions >= 1
    assert model.counters.generation_tokens == 24
    assert model.pool.used == 0


def test_fetched_requests_are_not_stuck_behind_a_preempted_one() -> None:
    model = build(kv_blocks=8, max_num_batched_tokens=64, max_num_seqs=1)
    model.submit(request("pulled", 16, 2, family=2, pull=True))
    model.step(0)
    model.submit(request("runs", 12, 12, family=1))
    model.step(0)
    model.fetch_finished("pulled", ok=True)
    finish(model)
    assert model.counters.generation_tokens == 14


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_cancel_frees_the_blocks_in_every_state(steps: int) -> None:
    model = build()
    model.submit(request("a", 40, 5, pull=steps == 1))
    for _ in range(steps):
        model.step(0)
    assert model.state_of("a") is not None
    assert model.cancel("a")
    assert model.state_of("a") is None
    assert not model.cancel("a")
    assert (model.pool.used, model.has_work) == (0, False)


def test_cancel_of_a_fetched_request_frees_its_blocks() -> None:
    model = build()
    model.submit(request("a", 40, 5, pull=True))
    model.step(0)
    model.fetch_finished("a", ok=True)
    assert model.cancel("a")
    assert model.pool.used == 0


def test_bad_requests_are_refused_with_what_to_do() -> None:
    model = build(kv_blocks=4)
    with pytest.raises(ValueError, match="raise kv_blocks or shorten"):
        model.submit(request("big", 16, 1))
    model.submit(request("a", 4))
    with pytest.raises(ValueError, match="in use"):
        model.submit(request("a", 4))
    with pytest.raises(ValueError, match="at least one token"):
        request("empty", 0)
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        EngineModelConfig(block_size=0)


def test_transfers_queue_behind_each_other_on_one_link() -> None:
    link = TransferLink(TransferCost(kv_bytes_per_token=100, bytes_per_s=1_000_000, overhead_us=50))
    assert link.reserve(10, now_us=0) == 1050
    assert link.reserve(10, now_us=100) == 2100
    assert link.reserve(0, now_us=9000) == 9050
    assert link.cost.bytes_of(3) == 300


def test_capacity_in_tokens() -> None:
    assert EngineModelConfig(block_size=16, kv_blocks=10).kv_capacity_tokens == 160


def test_a_long_prefill_that_is_alone_takes_the_whole_batch() -> None:
    model = build(long_prefill_token_threshold=4)
    model.submit(request("a", 40))
    assert model.step(0).prefill_tokens == 16
    model.submit(request("b", 40, family=1))
    assert model.step(0).prefill_tokens == 8, "four tokens of each"


def test_a_peer_may_have_a_part_of_the_prompt_only() -> None:
    model = build()
    part = EngineRequest(
        request_id="a", prompt_tokens=40, output_tokens=1, block_keys=range(10), pull=True, pull_tokens=24
    )
    model.submit(part)
    (fetch,) = model.step(0).fetches
    assert fetch.missing_tokens == 24
    assert model.fetch_finished("a", ok=True)
    assert finish(model)["a"] == PromptSources(16, 0, 24)
    model.submit(replace(part, request_id="b", pull_tokens=8))
    assert finish(model)["b"] == PromptSources(4, 36, 0), "what is here already is not fetched"


def test_a_power_cap_saves_nothing_in_a_step_that_draws_less() -> None:
    free = PowerModel(idle_mw=50_000, full_mw=300_000, cap_mw=300_000, weights_us=500)
    capped = replace(free, cap_mw=200_000)

    def spent(model: PowerModel, prefill_tokens: int) -> int:
        work = {"duration_us": 1_000, "steps": 1, "context_tokens": 0, "pairs": 0}
        return model.step_nj(COST, prefill_tokens=prefill_tokens, **work)

    assert spent(free, 0) == spent(capped, 0) < 150_000 * 1_000
    assert spent(free, 1_000) > spent(capped, 1_000) == 150_000 * 1_000


@pytest.mark.parametrize(
    ("by_priority", "order"), [(False, ["first", "late", "long", "short"]), (True, ["first", "short", "long", "late"])]
)
def test_who_waits_is_taken_by_priority_then_by_arrival(by_priority: bool, order: list[str]) -> None:
    model = build(priority_scheduling=by_priority, max_num_seqs=1)
    model.submit(request("first", 40, priority=9))
    model.step(0)  # it is in the batch before the others come
    for family, (name, priority) in enumerate([("late", 7), ("long", 5), ("short", 0)], start=1):
        model.submit(request(name, 40, family=family, priority=priority))
    ended: list[str] = []
    finish(model, ended=ended)
    assert ended == order


def test_by_priority_the_last_in_rank_is_preempted_and_waits_in_its_rank() -> None:
    model = build(priority_scheduling=True, kv_blocks=8)
    for family, (name, priority) in enumerate([("long", 5), ("short", 0)]):
        model.submit(request(name, 12, 16, family=family, priority=priority))
        model.step(0)
    ended: list[str] = []
    finish(model, ended=ended)
    assert ended == ["short", "long"]
    assert model.counters.preemptions == 1

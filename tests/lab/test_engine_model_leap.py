"""A leap is a shortcut, not another model: it equals single steps to the block and the microsecond."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_lab.engine_model import EngineModel, EngineModelConfig, EngineRequest, StepCost

BLOCK = 4
COST = StepCost(
    base_us=100,
    floor_us=130,
    decode_us_per_sequence=7,
    decode_ns_per_context_token=900,
    prefill_tokens_per_s=1_000_000,
    prefill_attention_ps_per_pair=3_000,
)


@dataclass
class Run:
    """Drives one model to its end and writes down when every token came."""

    leaps: bool
    config: EngineModelConfig
    now_us: int = 0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    steps: int = 0

    def __post_init__(self) -> None:
        self.model = EngineModel(self.config)

    def until(self, until_us: int) -> None:
        while self.now_us < until_us and self.model.has_work:
            leap = self.model.plan_leap(self.now_us, until_us=until_us) if self.leaps else None
            if leap is not None:
                self.model.carry_out(leap)
                for duration_us in leap.durations_us:
                    self.now_us += duration_us
                    self.steps += 1
                    for name in leap.request_ids:
                        self.tokens.setdefault(name, []).append(self.now_us)
                continue
            result = self.model.step(self.now_us)
            if result.idle:
                break
            self.now_us += result.duration_us
            self.steps += not result.idle and result.duration_us > 0
            for item in result.progress:
                self.tokens.setdefault(item.request_id, []).append(self.now_us)
            for fetch in result.fetches:
                self.model.fetch_finished(fetch.request_id, ok=True)
        self.now_us = max(self.now_us, until_us)


requests = st.tuples(
    st.integers(0, 400),  # arrives so long after the one before, in microseconds
    st.integers(0, 3),  # family: requests of one family share their prefix
    st.integers(1, 25),
    st.integers(1, 25),
    st.booleans(),  # hold
)


@given(
    st.lists(requests, max_size=12),
    st.integers(14, 40),
    st.integers(1, 5),
    st.integers(2, 12),
    st.sampled_from([0, 3, 40]),
)
@settings(max_examples=200, deadline=None)
def test_a_leap_equals_single_steps(
    arrivals: list[tuple[int, int, int, int, bool]], blocks: int, seqs: int, budget: int, host_blocks: int
) -> None:
    config = EngineModelConfig(
        block_size=BLOCK,
        kv_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        kv_lease_us=700,
        host_blocks=host_blocks,
        cost=COST,
    )
    runs = [Run(leaps=True, config=config), Run(leaps=False, config=config)]
    now_us = 0
    for number, (gap_us, family, prompt, output, hold) in enumerate(arrivals):
        now_us += gap_us
        keys = [family * 1000 + index for index in range((prompt + output) // BLOCK)]
        for run in runs:
            run.until(now_us)
            run.model.submit(
                EngineRequest(
                    request_id=f"r{number}", prompt_tokens=prompt, output_tokens=output, block_keys=keys, hold=hold
                )
            )
    for run in runs:
        for _ in range(100):
            run.until(run.now_us + 1_000)
        run.model.holds.expire(now_us=run.now_us)
        run.model.check()
        assert not run.model.has_work
    assert runs[0].tokens == runs[1].tokens
    assert runs[0].steps == runs[1].steps
    assert runs[0].model.counters == runs[1].model.counters
    everyone = [key for family in range(4) for key in range(family * 1000, family * 1000 + 13)]
    found = [[run.model.pool.lookup([key]) for key in everyone] for run in runs]
    assert found[0] == found[1], "the same blocks are cached, at the same places"


def test_a_long_decode_is_one_leap() -> None:
    run = Run(leaps=True, config=EngineModelConfig(block_size=BLOCK, kv_blocks=1000, cost=COST))
    run.model.submit(EngineRequest(request_id="a", prompt_tokens=8, output_tokens=500, block_keys=range(127)))
    run.model.step(0)
    leap = run.model.plan_leap(1_000, until_us=10**9)
    assert leap is not None
    run.model.carry_out(leap)
    assert len(leap.durations_us) == 498, "all but the last token, which ends the request"
    assert leap.duration_us == sum(leap.durations_us)
    assert run.model.plan_leap(leap.duration_us, until_us=10**9) is None


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(2, 60)), min_size=1, max_size=5), st.integers(1, 4_000))
@settings(max_examples=60, deadline=None)
def test_a_leap_cut_short_is_the_leap_planned_for_less(sizes: list[tuple[int, int]], span_us: int) -> None:
    model = EngineModel(EngineModelConfig(block_size=BLOCK, kv_blocks=500, max_num_batched_tokens=500, cost=COST))
    for number, (prompt, output) in enumerate(sizes):
        keys = range(1000 * number, 1000 * number + (prompt + output) // BLOCK)
        request = EngineRequest(request_id=f"r{number}", prompt_tokens=prompt, output_tokens=output, block_keys=keys)
        model.submit(request)
    now_us = model.step(0).duration_us
    whole = model.plan_leap(now_us, until_us=1 << 40)
    part = model.plan_leap(now_us, until_us=now_us + span_us)
    assert (whole is None) == (part is None)
    if whole is not None:
        assert whole.before(span_us) == part

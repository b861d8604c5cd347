"""Invariants of the engine model under any order of requests, fetches, cancellations and expiries."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from conserve_lab.engine_model import EngineModel, EngineModelConfig, EngineRequest, StepCost

BLOCK = 4
LEASE_US = 5_000


class EngineMachine(RuleBasedStateMachine):
    """Conversations are families of one growing token line; a request is a prefix of its family's line."""

    fetches = Bundle("fetches")

    def __init__(self) -> None:
        super().__init__()
        self.model = EngineModel(
            EngineModelConfig(
                block_size=BLOCK,
                kv_blocks=12,
                max_num_seqs=3,
                max_num_batched_tokens=10,
                kv_lease_us=LEASE_US,
                priority_scheduling=True,
                cost=StepCost(base_us=100),
            )
        )
        self.now_us = 0
        self.names = 0
        self.longest: dict[int, int] = {}
        self.prompts: dict[str, tuple[int, int]] = {}
        self.outputs: dict[str, int] = {}
        self.emitted: dict[str, int] = {}

    @rule(
        family=st.integers(0, 2),
        prompt=st.integers(1, 30),
        output=st.integers(1, 12),
        pull=st.booleans(),
        hold=st.booleans(),
        priority=st.integers(0, 2),
    )
    def submit(self, family: int, prompt: int, output: int, pull: bool, hold: bool, priority: int) -> None:
        self.names += 1
        name = f"r{self.names}"
        keys = [family * 1000 + index for index in range((prompt + output) // BLOCK)]
        self.model.submit(
            EngineRequest(
                request_id=name,
                prompt_tokens=prompt,
                output_tokens=output,
                block_keys=keys,
                pull=pull,
                hold=hold,
                priority=priority,
            )
        )
        self.prompts[name] = (family, prompt)
        self.outputs[name] = output

    @rule(target=fetches)
    def step(self) -> str:
        result = self.model.step(self.now_us)
        self.now_us += result.duration_us
        for item in result.progress:
            self.emitted[item.request_id] = self.emitted.get(item.request_id, 0) + 1
            if item.sources is not None:
                family, prompt = self.prompts[item.request_id]
                total = item.sources.local_compute + item.sources.local_cache_hit
                assert total + item.sources.external_kv_transfer == prompt
                # Nothing can be found that nobody of this family ever put there.
                assert item.sources.local_cache_hit <= self.longest.get(family, 0)
            if item.finished:
                assert self.emitted[item.request_id] == self.outputs[item.request_id]
        # Whoever runs or fetches may have put its whole line into the cache by the next step.
        for name, (family, prompt) in self.prompts.items():
            self.longest[family] = max(self.longest.get(family, 0), prompt + self.outputs[name])
        return result.fetches[0].request_id if result.fetches else ""

    @rule(name=consumes(fetches), ok=st.booleans())
    def fetched(self, name: str, ok: bool) -> None:
        self.model.fetch_finished(name, ok=ok)

    @rule(number=st.integers(1, 40))
    def cancel(self, number: int) -> None:
        self.model.cancel(f"r{number}")
        self.model.holds.release(f"r{number}")

    @rule(late_us=st.sampled_from([-1, 0, 1]))
    def land_on_next_expiry(self, late_us: int) -> None:
        due_us = self.model.holds.next_expiry_us()
        if due_us is not None and due_us + late_us >= self.now_us:
            self.now_us = due_us + late_us
            ended = self.model.holds.expire(now_us=self.now_us)
            assert bool(ended) == (late_us >= 0)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.model.check()

    @invariant()
    def an_engine_without_requests_and_holds_pins_nothing(self) -> None:
        if not self.model.has_work and not self.model.fetching and not self.model.holds:
            assert self.model.pool.used == 0

    def teardown(self) -> None:
        """Whatever happened, everything ends: no deadlock, no leak."""
        for name in list(self.prompts):
            self.model.fetch_finished(name, ok=True)
        for _ in range(5000):
            result = self.model.step(self.now_us)
            self.now_us += result.duration_us or LEASE_US
            for fetch in result.fetches:
                self.model.fetch_finished(fetch.request_id, ok=True)
            if not self.model.has_work and not self.model.holds:
                break
        self.model.check()
        assert (self.model.pool.used, self.model.has_work, self.model.fetching) == (0, False, 0)


EngineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestEngineMachine = EngineMachine.TestCase

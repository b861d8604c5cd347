"""`conserve bench emulator`, small, and the emulator's clock that it measures."""

from __future__ import annotations

import asyncio
import json

from conserve_lab.bench.fidelity import FidelityRun
from conserve_lab.cli import bench_main
from conserve_lab.emulator.driver import Driver, DriverHooks
from conserve_lab.engine_model import EngineModel, EngineModelConfig, EngineRequest, StepCost, StepResult


def test_all_figures_are_there(tmp_path, capsys) -> None:
    target = tmp_path / "emulator.json"
    argv = ["emulator", "--streams", "3", "--streams", "2", "--engines", "2", "--output-tokens", "6"]
    assert bench_main([*argv, "--repetitions", "1", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert [row["streams"] for row in found["rows"]] == [2, 3]
    for row in found["rows"]:
        assert row.keys() >= {"tokens_per_s", "holds", "ttft_late_ms", "tbt_error", "duration_error", "cpus"}
        assert row["tbt_error"]["spread_abs_p95"]["n"] == 1
    assert found["holds_up_to"] is None or found["holds_up_to"]["streams"] in {2, 3}
    assert "emulator against its model" in capsys.readouterr().out


def test_an_engine_could_hold_all_streams() -> None:
    run = FidelityRun(streams=(500,), prompt_tokens=1_000)
    assert all(engine.kv_cache_tokens >= 500 * 1_128 for engine in run.fleet().engine)


async def test_a_step_begins_where_the_one_before_it_ended() -> None:
    """However late the loop was woken; else every step would be longer than the model says."""
    begun: list[StepResult] = []
    instants: list[int] = []

    class Noting(EngineModel):
        def step(self, now_us: int) -> StepResult:
            result = super().step(now_us)
            if not result.idle:
                begun.append(result)
                instants.append(now_us)
            return result

    now_us = [1_000_000]

    def clock_us() -> int:
        now_us[0] += 700  # every look at it takes a while: the loop is always late
        return now_us[0]

    ended = asyncio.Event()
    hooks = DriverHooks(
        on_fetch=lambda _: None, on_token=lambda *_: None, on_finish=lambda _: ended.set(), on_expired=lambda _: None
    )
    model = Noting(EngineModelConfig(cost=StepCost(base_us=1_000, decode_us_per_sequence=0)))
    driver = Driver(model=model, clock_us=clock_us, hooks=hooks)
    task = asyncio.create_task(driver.run())
    driver.submit(
        EngineRequest(request_id="a", prompt_tokens=8, output_tokens=6, block_keys=()), changed=asyncio.Event()
    )
    await asyncio.wait_for(ended.wait(), 30)
    task.cancel()
    assert len(instants) == 6
    for before, instant, after in zip(begun, instants, instants[1:], strict=False):
        assert after == instant + before.duration_us

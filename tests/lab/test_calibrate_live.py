"""`conserve lab calibrate --engine`: what is measured, how it is parted, and that a known engine is found again."""

from __future__ import annotations

import json

import pytest

from conserve_lab.calibration import Cells, FittedEngine, cell_errors, fit
from conserve_lab.calibration.virtual import foresee
from conserve_lab.cli import lab_main
from conserve_lab.engine_model import EngineModelConfig, EngineRequest, StepCost
from conserve_lab.live.calibrate_command import halves
from conserve_lab.live.cells import FrontCell, Grid
from conserve_lab.live.prediction import Front, fit_front, predicted_turns, summary
from conserve_lab.live.thin_client import StreamFailed, stream_tokens
from conserve_lab.replay import ConversationSample, TurnSample
from conserve_lab.vllm.counters import EngineCounters
from conserve_lab.workloads import Conversation, Turn

from .known_engine import CHUNK, cells_of

KNOWN = FittedEngine(
    cost=StepCost(
        base_us=2_000,
        floor_us=3_000,
        decode_us_per_sequence=20,
        decode_ns_per_context_token=100,
        prefill_tokens_per_s=100_000,
        prefill_attention_ps_per_pair=20_000,
    ),
    front_us=8_000,
)


def _cells() -> Cells:
    grid = Grid()
    return cells_of(
        KNOWN, sequences=grid.sequences, context_tokens=grid.context_tokens, prompt_tokens=grid.prefill_tokens
    )


class TestParting:
    def test_no_cell_is_in_both_halves_and_none_is_lost(self) -> None:
        cells = _cells()
        fitting, held_out = halves(cells)
        assert set(fitting.decode) | set(held_out.decode) == set(cells.decode)
        assert set(fitting.prefill) | set(held_out.prefill) == set(cells.prefill)
        assert not set(fitting.decode) & set(held_out.decode)
        assert not set(fitting.prefill) & set(held_out.prefill)

    def test_both_halves_see_every_batch_size(self) -> None:
        for half in halves(_cells()):
            assert {cell.sequences for cell in half.decode} == set(Grid().sequences)

    def test_a_known_engine_is_found_from_half_of_its_cells(self) -> None:
        fitting, held_out = halves(_cells())
        errors = [abs(error) for *_, error in cell_errors(fit(fitting), held_out)]
        assert sum(errors) / len(errors) < 0.02


def test_a_grid_is_cut_to_the_engines_context() -> None:
    grid = Grid().within(1_500)
    assert max(grid.prefill_tokens) <= 1_500 - grid.output_tokens
    assert max(grid.context_tokens) <= 1_500 - grid.output_tokens
    assert Grid().within(0) == Grid()


class TestForesight:
    def test_requests_wait_for_each_other(self) -> None:
        config = EngineModelConfig(max_num_batched_tokens=CHUNK, cost=KNOWN.cost)
        requests = [
            (at_us, EngineRequest(request_id=name, prompt_tokens=1024, output_tokens=2, block_keys=()))
            for name, at_us in (("a", 0), ("b", 1))
        ]
        first, second = foresee(config, requests)
        alone = KNOWN.cost.step_us(decodes=0, context_tokens=0, prefill_tokens=1024, prefill_pairs=1024 * 1024 // 2)
        assert first.ttft_us == alone
        assert second.ttft_us > 1.9 * alone
        assert first.duration_us == first.tokens_us[-1]
        assert first.mean_tbt_us == first.tokens_us[1] - first.tokens_us[0]

    def test_an_engine_that_is_its_model_is_predicted_exactly(self) -> None:
        front = Front(base_us=5_000, ns_per_token=3_000)
        config = EngineModelConfig(block_size=16, kv_blocks=4096, max_num_batched_tokens=CHUNK, cost=KNOWN.cost)
        prompts = (800, 900)
        requests = [
            (
                turn * 1_000_000 + front.us(tokens),
                EngineRequest(
                    request_id=str(turn),
                    prompt_tokens=tokens,
                    output_tokens=4,
                    block_keys=[100 + index for index in range((tokens + 4) // 16)],
                ),
            )
            for turn, tokens in enumerate(prompts)
        ]
        turns = [
            TurnSample(
                conversation_id="a",
                turn=number + 1,
                last=number == 1,
                asked_s=number,
                attempt_s=number,
                first_token_s=number + (foreseen.ttft_us + front.us(prompts[number])) / 1_000_000,
                done_s=number + 0.9,
                prompt_tokens=prompts[number],
                completion_tokens=4,
            )
            for number, foreseen in enumerate(foresee(config, requests))
        ]
        trace = [Conversation(conversation_id="a", turns=2 * (Turn(append_tokens=800, output_tokens=4),))]
        predicted = predicted_turns(
            KNOWN,
            front,
            [ConversationSample(conversation_id="a", arrived_s=0.0, turns=turns)],
            trace,
            counters=EngineCounters(block_size_tokens=16, kv_capacity_tokens=65_536),
            max_num_batched_tokens=CHUNK,
            max_num_seqs=64,
        )
        assert all(abs(each.error) < 0.001 for each in predicted)
        assert predicted[1].cached_tokens_foreseen == 800
        found = summary(predicted)
        assert found["first_turns"]["turns"] == found["follow_ups"]["turns"] == 1
        assert found["all"]["abs_p90"] < 0.001

    def test_the_way_to_the_first_step_is_a_line(self) -> None:
        step_us = KNOWN.cost.step_us(decodes=0, context_tokens=0, prefill_tokens=1)
        cells = [FrontCell(tokens, step_us + 7_000 + 3 * tokens) for tokens in (100, 1_000, 4_000)]
        assert fit_front(cells, KNOWN) == Front(base_us=7_000, ns_per_token=3_000)


class TestCommand:
    def test_a_live_engine_is_measured_fitted_and_predicted(self, fleet, tmp_path, capsys) -> None:
        target, cells = tmp_path / "found.json", tmp_path / "cells.json"
        argv = ["calibrate", "--engine", fleet.engine("d0").url, "--repetitions", "1", "--conversations", "2"]
        # How well this machine keeps time is no matter here, so neither is the verdict.
        assert lab_main([*argv, "--json", str(target), "--save-cells", str(cells)]) in {0, 1}
        found = json.loads(target.read_text())
        assert found["fitted"]["cells"] == found["held_out"]["cells"] == 17
        assert found["prediction"]["conversations"] == 2
        assert len(found["prediction"]["each_turn"]) == found["prediction"]["all"]["turns"] == 10
        assert all(turn["cached_tokens"] > 0 for turn in found["prediction"]["each_turn"] if turn["turn"] > 1)
        assert len(found["front"]["cells"]) == 7
        assert "cells that were not fitted" in capsys.readouterr().out
        assert lab_main(["calibrate", "--cells", str(cells)]) in {0, 1}

    def test_an_engine_that_fails_is_named(self, fleet, capsys) -> None:
        fleet.faults("d0", fail_next=1)
        assert lab_main(["calibrate", "--engine", fleet.engine("d0").url, "--repetitions", "1"]) == 1
        assert "failed: StreamFailed: " in capsys.readouterr().err

    @pytest.mark.parametrize("argv", [[], ["--engine", "http://127.0.0.1:9", "--local-vllm", "x"]])
    def test_one_source_is_to_be_named(self, argv, capsys) -> None:
        assert lab_main(["calibrate", *argv]) == 2
        assert "--cells FILE, --engine URL, or --local-vllm VENV" in capsys.readouterr().err


async def test_a_cut_stream_is_no_measurement(fleet) -> None:
    fleet.faults("d0", drop_next=1, drop_after_chunks=1)
    with pytest.raises(StreamFailed, match="ended early"):
        await stream_tokens(fleet.engine("d0").url, model="emulated", prompt=[1, 2, 3], output_tokens=8)

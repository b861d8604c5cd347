"""`conserve bench hold` on real vLLM, with a short hold: what it says agrees with what holds are for."""

import json

import pytest

from conserve_lab.cli import bench_main

HOLD_S = 8


@pytest.mark.usefixtures("vllm_here")
def test_the_measurement_shows_what_holds_keep_and_what_a_full_decoder_costs(tmp_path, capsys):
    target = tmp_path / "hold.json"
    assert bench_main(["hold", "--hold-s", str(HOLD_S), "--turns", "2", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    loose, held = found["loose"], found["held"]
    assert loose["again_tokens"] == loose["history_tokens"] > 4_000, "the strangers push everything out"
    assert held["again_tokens"] < loose["again_tokens"] // 2
    assert found["newcomer_full_s"] > found["newcomer_free_s"]
    assert 0 < found["bounded_held_tokens"] <= 12_288 // 2, "the broker's bound: half of the cache"
    assert "history computed again" in capsys.readouterr().out

"""`conserve bench sdk`, small: that it measures all it says, not what it measures."""

from __future__ import annotations

import json
import subprocess

import pytest

from conserve_lab.bench import router
from conserve_lab.cli import bench_main, named_benches

KEYS = {"added_p50_ms", "added_cpu_us_per_turn", "streaming_rate_ratio", "cpu_us_per_chunk", "extra_connections"}


def test_all_figures_are_there(tmp_path, capsys) -> None:
    target = tmp_path / "sdk.json"
    argv = ["sdk", "--json", str(target), "--blocks", "2", "--turns", "2", "--streams", "2", "--no-peer"]
    assert bench_main(argv) == 0
    found = json.loads(target.read_text())
    assert found.keys() >= KEYS | {"goals", "bare", "load", "client_init_ms", "spread"}
    assert found["spread"]["added_cpu_us_per_turn"]["n"] == 2
    # Not how many: a machine that pauses for seconds lets idle connections run out. That none is wasted is held by
    # `test_streams_use_one_connection_after_another` and `test_five_streams_one_connection`.
    assert isinstance(found["extra_connections"], int)
    assert found["bare"]["cpu_us_per_chunk"]["n"] == 2
    assert found["engine_requests_per_turn"] == pytest.approx(4 / 3, abs=0.001)  # two follow-ups, one prefill
    assert found["peer"] == {"skipped": "not asked for"}
    assert found["transport_only"].keys() >= KEYS | {"spread"}
    assert found["async"].keys() >= KEYS | {"goals", "bare", "spread", "peer", "transport_only"}
    assert found["async"]["engine_requests_per_turn"] == pytest.approx(4 / 3, abs=0.001)
    assert len(found["load"]["load_average_after"]) == 3
    assert "conserve_sdk" in capsys.readouterr().out


def test_without_a_router_the_rest_is_measured(tmp_path, monkeypatch, capsys) -> None:
    def offline(*_args: object, **_kwargs: object) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(router.subprocess, "run", offline)
    target = tmp_path / "sdk.json"
    argv = ["sdk", "--json", str(target), "--blocks", "1", "--turns", "1", "--streams", "1"]
    assert bench_main([*argv, "--cache", str(tmp_path)]) == 0
    assert "could not be installed" in json.loads(target.read_text())["peer"]["skipped"]
    assert "vllm-router skipped" in capsys.readouterr().out


def test_a_wrong_option_is_a_usage_error(capsys) -> None:
    assert bench_main(["sdk", "--blocks", "0"]) == 2
    assert capsys.readouterr().err.startswith("conserve bench sdk: ")


def test_the_help_of_bench_names_every_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_main(["--help"]) == 0
    told = capsys.readouterr().out
    for name in named_benches():
        assert f"{name} (" in told, name

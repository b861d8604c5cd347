"""The command that runs the suite on several vLLM versions, with a real pytest on a suite of a few lines."""

import json

import pytest

from conserve_lab.vllm.install import plan_install
from conserve_lab.vllm.pins import pins_file
from conserve_lab.vllm.versions import SuiteResult, main, table

SUITE = """
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm


@pytest.fixture
def torn():
    yield
    assert False, "in teardown"


def test_in_the_environment():
    assert os.environ["CONSERVE_REQUIRE_VLLM"] == "1"
    assert (Path(os.environ["CONSERVE_VLLM_VENV"]) / "conserve-requirements.sha256").is_file()


def test_of_the_newest_only():
    assert "0.31.0" not in os.environ["CONSERVE_VLLM_VENV"]


@pytest.mark.parametrize("n", [1, 2])
def test_left_out(n):
    if n == 2:
        pytest.skip("not here")


def test_torn(torn):
    pass
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder with a suite, and environments that are stamped as installed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = vllm\n")
    suite = tmp_path / "tests" / "vllm"
    suite.mkdir(parents=True)
    (suite / "test_small.py").write_text(SUITE)
    for version in ("0.32.0", "0.31.0"):
        venv = tmp_path / "work" / version / "venv"
        venv.mkdir(parents=True)
        with pins_file(version) as requirements:
            plan = plan_install(venv, requirements=requirements)
            plan.stamp.write_text(plan.digest)
    return tmp_path


def test_a_table_of_versions_grows_by_each_run_and_names_what_did_not_pass(repository, capsys):
    assert main(["0.31.0", "--folder", "work", "--pytest=-q"]) == 1
    assert "| | 0.31.0 |" in capsys.readouterr().out
    assert main(["0.32.0", "--folder", "work", "--pytest=-k in_the_environment"]) == 0
    shown = capsys.readouterr().out
    assert "| | 0.32.0 | 0.31.0 |" in shown
    assert "| `test_small` | 1 | **2 of 5** |" in shown
    assert "- 0.31.0: `test_small::test_of_the_newest_only` failed" in shown
    assert "- 0.31.0: `test_small::test_left_out[2]` skipped" in shown
    assert "- 0.31.0: `test_small::test_torn` failed" in shown
    found = json.loads((repository / "work" / "0.31.0" / "found.json").read_text())
    assert found["version"] == "0.31.0"
    assert found["seconds"] > 0


def test_an_environment_is_removed_when_nobody_wants_it_any_more(repository):
    main(["0.32.0", "--folder", "work", "--discard", "--pytest=-k in_the_environment"])
    assert not (repository / "work" / "0.32.0" / "venv").exists()
    assert (repository / "work" / "0.32.0" / "found.json").is_file()


def test_no_test_at_all_is_no_result(repository, capsys):
    assert main(["0.32.0", "--folder", "work", "--pytest=-k nothing_like_it"]) == 1
    assert "error: the suite did not run on vLLM 0.32.0" in capsys.readouterr().err
    assert not (repository / "work" / "0.32.0" / "found.json").exists()


def test_outside_of_the_repository_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["0.32.0"]) == 2
    assert "no tests/vllm here" in capsys.readouterr().err


def test_a_file_that_one_version_did_not_run_is_a_dash():
    results = [
        SuiteResult(version="b", seconds=2.4, load=1.0, outcomes={"test_a::x": "passed"}),
        SuiteResult(version="a", seconds=1.0, load=0.5, outcomes={"test_b::y": "passed"}),
    ]
    assert table(results).splitlines()[2:] == [
        "| `test_a` | 1 | - |",
        "| `test_b` | - | 1 |",
        "| all | 1 of 1, 2 s, load 1.0 | 1 of 1, 1 s, load 0.5 |",
    ]

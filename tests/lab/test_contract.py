"""The emulated engine keeps the contract that vLLM itself keeps (`tests/vllm/test_contract.py` runs the same)."""

import httpx2
import pytest

from conserve_lab.emulator import EmulatedFleet, default_fleet
from tests.contract.engine import CASES, SEQUENCES, Engines, check_case


@pytest.fixture(scope="module")
def engines():
    with (
        EmulatedFleet(default_fleet(prefillers=1, decoders=1, time_scale=0, max_model_len=4_096)) as fleet,
        httpx2.Client(timeout=30, trust_env=False) as http,
    ):
        decoder = fleet.engine("d0")
        yield Engines(http, fleet.engine("p0").url, decoder.url, decoder.model, 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_answer(engines, case):
    check_case(engines, case, emulated=True)


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: sequence.__name__)
def test_a_sequence(engines, sequence):
    sequence(engines)

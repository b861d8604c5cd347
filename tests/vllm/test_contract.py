"""vLLM itself keeps the contract that the emulated engine keeps (`tests/lab/test_contract.py` runs the same)."""

import pytest

from conserve_lab.emulator import EmulatedFleet, default_fleet
from tests.contract.engine import CASES, SEQUENCES, Engines, check_case

REQUESTS = {
    "/v1/chat/completions": "ChatCompletionRequest",
    "/v1/completions": "CompletionRequest",
    "/v1/responses": "ResponsesRequest",
}
PROMPTS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "read the file"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "read the file", "max_tokens": 4},
    "/v1/responses": {"input": "read the file", "max_output_tokens": 4},
}
GIVEN = {"model", "messages", "prompt", "input", "max_tokens", "max_output_tokens", "stream"}
ROUTES = {*REQUESTS, "/v1/models", "/tokenize", "/detokenize", "/version", "/health", "/ping", "/load"}


@pytest.fixture
def engines(raw, fleet):
    return Engines(raw.http, fleet.engines["p0"].url, fleet.engines["d0"].url, fleet.model, fleet.eos_token_id)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_answer(engines, case):
    check_case(engines, case)


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: sequence.__name__)
def test_a_sequence(engines, sequence):
    sequence(engines)


def sample(schema):
    """A plain value of a field's type, or ... where it takes more than that to make one."""
    options = schema.get("anyOf", [schema])
    if schema.get("default") is not None:
        return schema["default"]
    if any(option.get("type") == "null" for option in options):
        return None
    return {"boolean": False, "integer": 1, "number": 1.0}.get(options[0].get("type"), ...)


@pytest.mark.parametrize(("path", "name"), REQUESTS.items(), ids=lambda value: value.rsplit("/", 1)[-1])
def test_the_emulator_accepts_every_field_of_vllms_own_description(raw, engines, path, name):
    described = raw.http.get(f"{engines.decoder}/openapi.json").json()["components"]["schemas"][name]["properties"]
    fields = {field: sample(schema) for field, schema in described.items() if field not in GIVEN}
    asked = {field: value for field, value in fields.items() if value is not ...}
    assert len(asked) > 30
    with EmulatedFleet(default_fleet(prefillers=0, decoders=1, time_scale=0)) as fleet:
        emulated = fleet.engine("d0")
        for url, model in ((engines.decoder, engines.model), (emulated.url, emulated.model)):
            answer = raw.http.post(f"{url}{path}", json=asked | PROMPTS[path] | {"model": model, "stream": False})
            assert answer.status_code == 200, f"{url}: {answer.text}"


def test_vllm_serves_every_route_of_the_emulator(raw, engines):
    paths = set(raw.http.get(f"{engines.decoder}/openapi.json").json()["paths"])
    assert paths >= ROUTES, ROUTES - paths

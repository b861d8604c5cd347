"""Real vLLM servers on this machine's CPU: the protocol spoken to them by hand (`raw`), and broker and SDK (`stage`).

Tests with `raw` say what vLLM itself does, which is what the SDK relies on; those with `stage` that it may.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from conserve_lab.vllm import EngineCounters, FleetOptions, VllmFleet, VllmMissingError, find_venv
from conserve_sdk.core.units import Ms, Tokens

from .leased import Stage

REQUIRE_VARIABLE = "CONSERVE_REQUIRE_VLLM"
GUARDED_VARIABLE = "CONSERVE_VLLM_GUARDED"
"""Set to run the tests of broker and SDK (those with `stage`) through guards."""
SETTLE_BUDGET_S = 30.0
REQUEST_BUDGET_S = 50.0

WORDS = ("read", "file", "count", "word", "edit", "line", "list", "return", "result", "user", "table", "query", "error")

Json = dict[str, Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "vllm":
            item.add_marker(pytest.mark.vllm)
            # The fleet has its own start budget; a test has a minute once it runs, faults (restarts) two.
            item.add_marker(pytest.mark.timeout(120, func_only=True))


@pytest.fixture(scope="session")
def vllm_here() -> None:
    """Skips where there is no vLLM, unless there must be one."""
    try:
        find_venv()
    except VllmMissingError as missing:
        if os.environ.get(REQUIRE_VARIABLE):
            raise
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def fleet(vllm_here: None) -> Iterator[VllmFleet]:
    """One prefiller, two decoders and an aggregated reference; caches of 12,288 tokens, which tests can fill."""
    options = FleetOptions(
        references=1,
        max_model_tokens=Tokens(4_096),
        kv_cache_tokens=Tokens(12_288),
        hold_ms=Ms(30_000),
        guarded=frozenset({"p0", "d0", "d1"} if os.environ.get(GUARDED_VARIABLE) else ()),
    )
    with VllmFleet(options) as running:
        yield running


class RawProtocol:
    """The legs of a turn by plain HTTP, with as little as possible around them."""

    def __init__(self, fleet: VllmFleet, http: httpx2.Client) -> None:
        self.fleet = fleet
        self.http = http

    def body(self, messages: list[Json], **extra: Any) -> Json:
        return {"model": self.fleet.model, "messages": messages, "temperature": 0, "max_tokens": 16, **extra}

    def task(self, name: str, *, words: int = 300) -> list[Json]:
        """A first turn about `words` tokens long that shares no block with another name's."""
        return [
            {"role": "system", "content": f"{name}: you are an agent."},
            {"role": "user", "content": self.prose(name, words)},
        ]

    def post(self, engine_id: str, body: Json, *, path: str = "chat/completions") -> httpx2.Response:
        return self.http.post(f"{self.fleet.engines[engine_id].api}/{path}", json=body)

    def ask(self, engine_id: str, body: Json, *, path: str = "chat/completions") -> Json:
        answer = self.post(engine_id, body, path=path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def prefill(self, body: Json, *, engine_id: str = "p0", path: str = "chat/completions") -> Json:
        """The first leg: one token, and leave the KV to be fetched. Returns the params for the second leg."""
        one = {"max_output_tokens": 1} if path == "responses" else {"max_tokens": 1, "return_token_ids": True}
        leg = body | one | {"stream": False, "kv_transfer_params": {"do_remote_decode": True}}
        answer = self.ask(engine_id, leg, path=path)
        params: Json = answer["kv_transfer_params"]
        if ids := answer.get("prompt_token_ids"):
            params["prompt_token_ids"] = ids
        return params

    def migrate(self, body: Json, *, decoder: str = "d0", path: str = "chat/completions") -> Json:
        """A first turn: prefill on `p0`, decode on the decoder."""
        return self.ask(decoder, body | {"kv_transfer_params": self.prefill(body, path=path)}, path=path)

    @staticmethod
    def prose(name: str, words: int = 300) -> str:
        """Different words for different names, so that greedy answers differ as well."""
        return f"{name} " + " ".join(random.Random(name).choices(WORDS, k=words))

    @staticmethod
    def ids(name: str, count: int) -> list[int]:
        """A prompt of exactly so many tokens, others for another name."""
        dice = random.Random(name)
        return [dice.randrange(10, 500) for _ in range(count)]

    def tokens(self, messages: list[Json]) -> int:
        """How long a chat prompt is, as the reference counts."""
        url = f"{self.fleet.engines['a0'].url}/tokenize"
        counted = self.http.post(url, json={"model": self.fleet.model, "messages": messages}).raise_for_status()
        return int(counted.json()["count"])

    @staticmethod
    def said(answer: Json) -> str:
        """The text of an answer, whichever of the three APIs gave it."""
        if "output" in answer:
            return "".join(part["text"] for item in answer["output"] for part in item["content"])
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert isinstance(text, str)
        return text

    @staticmethod
    def cached(answer: Json) -> int:
        """Prompt tokens that the engine says it found in its cache."""
        details = answer["usage"]["prompt_tokens_details"]
        return int(details["cached_tokens"]) if details else 0

    def fill_cache(self, engine_id: str, *, tag: str) -> None:
        """Give the engine so many other prompts that no unprotected block survives."""
        for number in range(6):
            self.ask(engine_id, self.body(self.task(f"{tag} {number}", words=2_200), max_tokens=1))

    def settled(
        self, engine_id: str, check: Callable[[EngineCounters], bool], *, budget_s: float = SETTLE_BUDGET_S
    ) -> EngineCounters:
        """Counters once they satisfy a condition: vLLM publishes them a step after the answer."""
        deadline = time.monotonic() + budget_s
        while not check(counters := self.fleet.metrics(engine_id)):
            assert time.monotonic() < deadline, f"{engine_id} never got there: {counters}"
            time.sleep(0.05)
        return counters


@pytest.fixture
def raw(fleet: VllmFleet) -> Iterator[RawProtocol]:
    with httpx2.Client(timeout=REQUEST_BUDGET_S, trust_env=False) as http:
        yield RawProtocol(fleet, http)


@pytest.fixture
def stage(fleet: VllmFleet, raw: RawProtocol, tmp_path: Path) -> Iterator[Stage]:
    with closing(Stage(fleet, raw, tmp_path)) as opened:
        yield opened


@pytest.fixture
def mended(fleet: VllmFleet) -> Iterator[None]:
    """Starts again what a test killed."""
    yield
    for engine_id in fleet.engines:
        if not fleet.is_alive(engine_id):
            fleet.restart(engine_id)

"""The two legs of a turn by plain HTTP: what vLLM itself does with them, without any of our code in between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import httpx2

from conserve_lab.vllm import EngineCounters, VllmFleet

SETTLE_BUDGET_S = 30.0
REQUEST_BUDGET_S = 50.0

WORDS = ("read", "file", "count", "word", "edit", "line", "list", "return", "result", "user", "table", "query", "error")

Json = dict[str, Any]


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

"""What holds are worth and what they cost, on real vLLM on this machine: `python -m conserve_lab.vllm.hold_cost`.

Two questions. How much history do follow-up turns compute again when others push it out of the cache between the
turns, with and without holds? And how long does a newcomer wait for room when a decoder is full of held KV, with and
without the broker's bound (`lease.hold_share`)? Tokens are vLLM's own counts; prompts are ids drawn with a fixed seed.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.vllm.fleet import FleetOptions, VllmFleet
from conserve_sdk import ConServe, conversation
from conserve_sdk.core.units import EngineId, Ms, Tokens

__all__ = ["main"]

CACHE_TOKENS = 12_288
HOLD_MS = 20_000
CONVERSATIONS, TURNS = 4, 4
FIRST_TOKENS, APPEND_TOKENS, ANSWER_TOKENS = 1_000, 64, 16
STRANGERS, STRANGER_TOKENS = 16, 1_000
HOLDERS, HOLDER_TOKENS, NEWCOMER_TOKENS = 8, 1_088, 3_904
"""Together more than the cache has; with only half of it held the newcomer fits."""
IDS = range(64, 500)
"""Inside the tiny model's vocabulary, clear of its special tokens."""
BUDGET_S = 120.0

Json = dict[str, Any]


class _Decoder:
    """One decoder, spoken to by hand."""

    def __init__(self, fleet: VllmFleet, http: httpx2.Client) -> None:
        self.fleet = fleet
        self._http = http
        self._draw = random.Random(7)  # noqa: S311  # prompts that nobody has seen, the same in every run

    def ids(self, count: int) -> list[int]:
        return self._draw.choices(IDS, k=count)

    def ask(self, prompt: list[int], *, hold: bool = False, max_tokens: int = 1) -> tuple[list[int], int]:
        """The answer's ids, and how many of the prompt were cached."""
        body: Json = {"model": self.fleet.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        if hold:
            body["kv_transfer_params"] = {"do_remote_decode": True}
        url = f"{self.fleet.engines[EngineId('d0')].api}/completions"
        found = self._http.post(url, json=body).raise_for_status().json()
        details = found["usage"]["prompt_tokens_details"] or {}
        return found["choices"][0]["token_ids"], details.get("cached_tokens") or 0

    def newcomer_s(self) -> float:
        started_s = time.monotonic()
        self.ask(self.ids(NEWCOMER_TOKENS))
        return time.monotonic() - started_s

    def wait_empty(self) -> None:
        deadline_s = time.monotonic() + BUDGET_S
        while self.fleet.metrics("d0").kv_used_tokens:
            if time.monotonic() > deadline_s:
                raise TimeoutError("the decoder never became empty")
            time.sleep(0.2)


def _pressed(decoder: _Decoder, *, hold: bool) -> tuple[int, int, float]:
    """History that follow-up turns had, how much of it they computed again, and a stranger's mean time in seconds."""
    talks = [decoder.ids(FIRST_TOKENS) for _ in range(CONVERSATIONS)]
    had = again = 0
    strangers_s = 0.0
    for turn in range(TURNS):
        for number, prompt in enumerate(talks):
            history = len(prompt) - APPEND_TOKENS if turn else 0
            said, cached = decoder.ask(prompt, hold=hold, max_tokens=ANSWER_TOKENS)
            had, again = had + history, again + max(history - cached, 0)
            talks[number] = prompt + said + decoder.ids(APPEND_TOKENS)
        started_s = time.monotonic()
        for _ in range(STRANGERS):
            decoder.ask(decoder.ids(STRANGER_TOKENS))
        strangers_s += time.monotonic() - started_s
    decoder.wait_empty()
    return had, again, strangers_s / (TURNS * STRANGERS)


def _bounded_s(decoder: _Decoder) -> float:
    """A newcomer's time when the same conversations are held by leases, within the broker's bound."""
    config = {
        "listen": {"port": 0},
        "placement": {"preset": "affinity"},
        "lease": {"hold_ms": HOLD_MS},
        "engine": [entry | {"max_hold_ms": HOLD_MS} for entry in decoder.fleet.broker_engines()],
    }
    with ExitStack() as stack:
        broker = stack.enter_context(BrokerServer(BrokerConfig.from_mapping(config)))
        broker.wait_until_ready(timeout_s=BUDGET_S, engines=1)
        client = stack.enter_context(stack.enter_context(ConServe(broker.url)).openai_client(max_retries=0))
        for number in range(HOLDERS):
            with conversation(f"holder {number}"):
                client.completions.create(
                    model=decoder.fleet.model, prompt=decoder.ids(HOLDER_TOKENS - 1), max_tokens=1, temperature=0
                )
        held = decoder.fleet.metrics("d0").kv_used_tokens
        sys.stdout.write(f"(of {HOLDERS} conversations by lease {held:,} tokens are held)\n")
        return decoder.newcomer_s()


def _rows(decoder: _Decoder) -> Iterator[str]:
    yield "| | without holds | held |"
    yield "|---|---|---|"
    (had, loose, loose_s), (_, kept, kept_s) = (_pressed(decoder, hold=hold) for hold in (False, True))
    yield f"| history computed again, of {had:,} tokens | {loose / had:.0%} | {kept / had:.0%} |"
    yield f"| a stranger's request, mean | {loose_s * 1000:.0f} ms | {kept_s * 1000:.0f} ms |"
    for _ in range(HOLDERS):
        decoder.ask(decoder.ids(HOLDER_TOKENS - 1))
    free_s = decoder.newcomer_s()
    for _ in range(HOLDERS):
        decoder.ask(decoder.ids(HOLDER_TOKENS - 1), hold=True)
    full_s = decoder.newcomer_s()
    yield f"| a newcomer of {NEWCOMER_TOKENS:,} tokens at a full decoder | {free_s:.1f} s | {full_s:.1f} s |"
    decoder.wait_empty()
    yield f"| the same through the broker (`hold_share` 0.5) | | {_bounded_s(decoder):.1f} s |"


def main() -> None:
    """Print the table."""
    options = FleetOptions(
        prefillers=0,
        decoders=1,
        max_model_tokens=Tokens(4_096),
        kv_cache_tokens=Tokens(CACHE_TOKENS),
        hold_ms=Ms(HOLD_MS),
    )
    with VllmFleet(options) as fleet, httpx2.Client(timeout=BUDGET_S, trust_env=False) as http:
        for row in _rows(_Decoder(fleet, http)):
            sys.stdout.write(row + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Short requests that show what an engine does: repeated ones for its cache, a pair of them for a transfer."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2

from conserve_sdk._bodies import TurnBody, decode_leg, prefill_leg, read_body
from conserve_sdk._kind import Kind
from conserve_sdk._kv_params import PREFILL, TransferRefused, read_ticket
from conserve_sdk.doctor._finding import Finding, fail, note, ok, reason
from conserve_sdk.doctor._look import EngineFacts, EngineHttp, NotAnEngineError, json_object
from conserve_sdk.doctor._page import MetricsPage

__all__ = ["Prober"]

CHAT = "/v1/chat/completions"
ANSWER_TOKENS = 12
TRANSFER_MS = 20_000
SETTLE_S = 5.0
POLL_S = 0.1
BLOCKS = 3
"""Blocks that a probe's prompt fills at least; a prompt below one block is never cached nor moved."""

WORDS = ("read", "file", "count", "word", "edit", "line", "list", "return", "result", "user", "table", "query")


class Prober:
    """Asks engines short questions.

    Args:
        http: the way to them.
        clock_s: monotonic seconds.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        http: EngineHttp,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._http = http
        self._clock_s = clock_s
        self._sleep = sleep

    # ---- the cache ------------------------------------------------------------------------------------------------

    def check_cache(self, facts: EngineFacts) -> Finding:
        """Ask the same short question twice: the second answer must say what came from the cache."""
        check = "cached_tokens"
        body = _body(facts, answer_tokens=1)
        try:
            answers = [self._ask(facts, body.raw) for _ in range(2)]
        except FAILURES as exc:
            return fail(facts.name, check, f"a short chat request failed ({reason(exc)})", fix=_chat_fix(exc))
        usage = answers[1].get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        cached, prompt = details.get("cached_tokens"), usage.get("prompt_tokens") or 0
        if cached:
            return ok(facts.name, check, f"{cached} of {prompt} tokens of a repeated prompt came from its cache")
        if details:
            detail = f"a prompt of {prompt} tokens, asked twice, was computed twice"
            how = "is prefix caching on, and the cache large enough for its load?"
            return fail(facts.name, check, detail, fix=how)
        detail = "its answers do not tell cached tokens, so nobody sees what a turn reused"
        return fail(facts.name, check, detail, fix="start it with --enable-prompt-tokens-details")

    # ---- the transfer ---------------------------------------------------------------------------------------------

    def check_transfer(self, prefiller: EngineFacts, decoder: EngineFacts) -> Iterator[Finding]:
        """Prefill a short prompt on one engine, let the other pull and answer, and compare with its own computing."""
        subject, check = f"transfer {_short(prefiller)} to {_short(decoder)}", "transfer"
        body = _body(decoder, answer_tokens=ANSWER_TOKENS, block_size=max(prefiller.block_size, decoder.block_size))
        lease_id = f"doctor-{uuid.uuid4().hex}"
        try:
            answer = self._ask(prefiller, prefill_leg(body, PREFILL))
            ticket = read_ticket(
                answer, lease_id=lease_id, now_ms=self._now_ms(), deadline_ms=TRANSFER_MS, send_ids=True
            )
            before = self._http.page(decoder.target)
            params = ticket.redeem(lease_id=lease_id, now_ms=self._now_ms(), hold=False)
        except TransferRefused as refused:
            yield fail(subject, check, f"{prefiller.name} gave no KV away ({refused})", fix=_connector_fix("producer"))
            return
        except FAILURES as exc:
            yield _refused(subject, check, f"the prefill failed ({reason(exc)})", exc)
            return
        started_s = self._clock_s()
        try:
            pulled = self._ask(decoder, decode_leg(body, params))
            took_ms = round((self._clock_s() - started_s) * 1000)
            yield self._moved(subject, decoder, before, pulled, took_ms=took_ms)
        except FAILURES as exc:
            yield _refused(subject, check, f"the decoder failed on the transferred prompt ({reason(exc)})", exc)
            return
        yield self._equal(subject, decoder, body, pulled)

    def _moved(
        self, subject: str, decoder: EngineFacts, before: MetricsPage, pulled: dict[str, Any], *, took_ms: int
    ) -> Finding:
        check = "transfer"
        prompt = (pulled.get("usage") or {}).get("prompt_tokens") or 0
        moved, failed, computed = self._settled(decoder, before, prompt)
        if moved:
            return ok(subject, check, f"{moved:.0f} of {prompt} tokens came over, answered in {took_ms} ms")
        if failed:
            how = "can it reach the prefiller's NIXL side channel (VLLM_NIXL_SIDE_CHANNEL_HOST and _PORT)? See its log"
            return fail(subject, check, "the transfer failed, and the decoder computed the prompt itself", fix=how)
        if not computed:
            return note(
                subject, check, "cannot tell what came over: its metrics have no vllm:prompt_tokens_by_source_total"
            )
        detail = "no KV came over: the decoder computed the prompt itself"
        return fail(subject, check, detail, fix=_connector_fix("consumer"))

    def _settled(self, decoder: EngineFacts, before: MetricsPage, prompt: int) -> tuple[float, float, float]:
        """Moved tokens, failed transfers and computed tokens since `before`: vLLM publishes them a step later."""
        until_s = self._clock_s() + SETTLE_S
        while True:
            now = self._http.page(decoder.target)
            source = "vllm:prompt_tokens_by_source_total"
            moved = _grown(before, now, source, source="external_kv_transfer")
            computed = _grown(before, now, source, source="local_compute")
            failed = _grown(before, now, "vllm:nixl_num_failed_transfers_total")
            if moved or computed >= max(prompt, 1) or self._clock_s() >= until_s:
                return moved, failed, computed
            self._sleep(POLL_S)

    def _equal(self, subject: str, decoder: EngineFacts, body: TurnBody, pulled: dict[str, Any]) -> Finding:
        """Compare greedy answers: the same decoder computes the prompt itself, in a cache of its own by a salt."""
        check = "transfer_answer"
        salted = json.dumps({**body.data, "cache_salt": uuid.uuid4().hex}).encode()
        try:
            local = self._ask(decoder, salted)
        except FAILURES as exc:
            return note(subject, check, f"could not compare answers ({reason(exc)})")
        if _said(local) == _said(pulled):
            return ok(subject, check, "the answer on transferred KV equals the decoder's own")
        detail = "the answer on transferred KV differs from the decoder's own"
        how = "with one dtype and model on both sides this is wrong KV; with bf16 under load it may be rounding: repeat"
        return fail(subject, check, detail, fix=how)

    # ---- pieces ---------------------------------------------------------------------------------------------------

    def _ask(self, facts: EngineFacts, content: bytes) -> dict[str, Any]:
        answer = self._http.post(facts.target, CHAT, content, request_id=f"doctor-{uuid.uuid4().hex}")
        if answer.status_code != 200:
            raise _RefusedError(answer)
        return json_object(answer)

    def _now_ms(self) -> int:
        return int(self._clock_s() * 1000)


class _RefusedError(Exception):
    """An answer that is none."""

    def __init__(self, answer: httpx2.Response) -> None:
        self.status = answer.status_code
        super().__init__(f"HTTP {answer.status_code}: {' '.join(answer.text.split())[:200]}")


FAILURES = (httpx2.HTTPError, NotAnEngineError, _RefusedError)


def _body(facts: EngineFacts, *, answer_tokens: int, block_size: int = 0) -> TurnBody:
    """A prompt that no cache holds, a few blocks long."""
    words = BLOCKS * (block_size or facts.block_size or 16)
    longest = max(facts.max_model_len // 4, 1) if facts.max_model_len else words
    name = uuid.uuid4().hex
    text = " ".join([name, *(_pick(WORDS, name, number) for number in range(min(words, longest)))])
    data = {
        "model": facts.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": answer_tokens,
        "temperature": 0,
        "stream": False,
    }
    return read_body(Kind.CHAT, json.dumps(data).encode())


def _pick(words: Sequence[str], name: str, number: int) -> str:
    return words[(int(name[number % len(name)], 16) + number) % len(words)]


def _said(answer: dict[str, Any]) -> object:
    choices = answer.get("choices") or [{}]
    return choices[0].get("message")


def _grown(before: MetricsPage, now: MetricsPage, name: str, **labels: str) -> float:
    return max((now.total(name, **labels) or 0.0) - (before.total(name, **labels) or 0.0), 0.0)


def _short(facts: EngineFacts) -> str:
    return facts.name.removeprefix("engine ")


def _chat_fix(exc: Exception) -> str:
    if isinstance(exc, _RefusedError) and exc.status in (401, 403):
        return "give its key: --engine-key, or CONSERVE_ENGINE_KEY"
    return (
        "agents talk by /v1/chat/completions: see the engine's log, and give the model a chat template if it has none"
    )


def _connector_fix(kv_role: str) -> str:
    return f"""start it with --kv-transfer-config '{{"kv_connector":"NixlConnector","kv_role":"kv_{kv_role}", ...}}'"""


def _refused(subject: str, check: str, detail: str, exc: Exception) -> Finding:
    if isinstance(exc, _RefusedError) and exc.status == 403:
        return note(subject, check, "not tried: a guard lets no transfer params through without a lease, as it should")
    how = 'see both engines\' logs; set "kv_load_failure_policy":"recompute" on the decoder'
    return fail(subject, check, detail, fix=how)

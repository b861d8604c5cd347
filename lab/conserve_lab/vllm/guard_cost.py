"""What a guard costs per request, in CPU time: `python -m conserve_lab.vllm.guard_cost`.

One coroutine after another in one thread, through an application that only reads its body, with and without the guard
in front; the difference is the guard's. CPU time, not wall time, so that other load does not count; the least of
several rounds, because caches only ever make a round slower.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from conserve_sdk.core.lease import EngineBinding, Mode
from conserve_sdk.core.units import (
    ConversationId,
    EngineId,
    Incarnation,
    LeaseId,
    LineageId,
    ModelName,
    Ms,
    TenantId,
    Tokens,
)
from conserve_sdk.tokens import LeaseClaims, SigningKey, TokenSigner
from conserve_vllm import GuardSettings, LeaseGuard

__all__ = ["main"]

SIZES_BYTES = (4 * 1024, 400 * 1024)
BYTES_PER_TOKEN = 4
ROUNDS = 7
ROUND_S = 0.15
PATH = "/v1/chat/completions"

Json = dict[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    body: bytes
    token: str


async def _reader(_scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b"{}"})


def _prefiller(answer: bytes) -> App:
    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": answer})

    return app


async def _ask(app: App, request: _Request) -> bytes:
    sent: list[bytes] = []

    async def receive() -> Json:
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Json) -> None:
        sent.append(message.get("body", b""))

    headers = [(b"content-type", b"application/json"), (b"x-conserve-lease", request.token.encode())]
    await app({"type": "http", "method": "POST", "path": PATH, "headers": headers}, receive, send)
    return b"".join(sent)


def _cpu_us(app: App, requests: Iterator[_Request]) -> float:
    """CPU microseconds per request, the least of several rounds."""

    async def round_us() -> float:
        waiting = [next(requests) for _ in range(count)]
        started_ns = time.process_time_ns()
        for request in waiting:
            await _ask(app, request)
        return (time.process_time_ns() - started_ns) / 1000 / count

    count = 1
    while (once := asyncio.run(round_us())) * count < ROUND_S * 1e6 and count < 4_096:
        count *= 2
    return min([once, *(asyncio.run(round_us()) for _ in range(ROUNDS))])


def _token(key: SigningKey) -> str:
    def engine(name: str) -> EngineBinding:
        return EngineBinding(engine_id=EngineId(name), url=f"http://{name}.invalid", incarnation=Incarnation("life"))

    now_ms = time.time_ns() // 1_000_000
    return TokenSigner([key]).sign(
        LeaseClaims(
            lease_id=LeaseId("lease"),
            epoch=1,
            tenant=TenantId("default"),
            conversation_id=ConversationId("c"),
            lineage=LineageId("main"),
            model=ModelName("m"),
            mode=Mode.MIGRATE,
            prefiller=engine("p0"),
            decoder=engine("d0"),
            ttl_ms=Ms(60_000),
            hold_ms=Ms(30_000),
            append_threshold_tokens=Tokens(0),
            ledger_tokens=Tokens(0),
            granted_at_ms=Ms(now_ms),
            exp_ms=Ms(now_ms + 3_600_000),
        )
    )


def _body(size_bytes: int, params: Json | None) -> Json:
    text = 'a line of what a tool returned, with "quotes" and\n' * (size_bytes // 50)
    body: Json = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 64}
    return body if params is None else body | {"kv_transfer_params": params}


def _answer(ids: list[int]) -> Json:
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(range(-(-len(ids) // 16)))],
        "remote_engine_id": "p0-life",
        "remote_request_id": secrets.token_hex(16),
        "remote_host": "10.0.0.1",
        "remote_port": 5600,
        "tp_size": 1,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": len(ids),
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
    }
    return {"choices": [], "prompt_token_ids": ids, "kv_transfer_params": params}


def _measure(size_bytes: int) -> dict[str, float]:
    key = SigningKey(kid="k", secret=secrets.token_bytes(48))
    token = _token(key)
    now_ms = Ms(time.time_ns() // 1_000_000)

    def guard(engine_id: str, app: App, *, require_lease: bool = False) -> LeaseGuard:
        settings = GuardSettings(engine_id=EngineId(engine_id), keys=(key,), require_lease=require_lease)
        # Time stands still: a loaded machine must not make params too old to be measured.
        return LeaseGuard(app, settings, now_ms=lambda: now_ms, incarnation=lambda: Incarnation("life"))

    def always(params: Json | None) -> Iterator[_Request]:
        request = _Request(body=json.dumps(_body(size_bytes, params)).encode(), token=token)
        while True:
            yield request

    ids = list(range(1_000, 1_000 + size_bytes // BYTES_PER_TOKEN))
    leg = {"do_remote_decode": True, "do_remote_prefill": False}

    def pulls() -> Iterator[_Request]:
        prefill = _Request(body=json.dumps(_body(size_bytes, leg)).encode(), token=token)
        while True:
            answer = _prefiller(json.dumps(_answer(ids)).encode())
            stamped = json.loads(asyncio.run(_ask(guard("p0", answer), prefill)))
            params = stamped["kv_transfer_params"] | {"prompt_token_ids": ids}
            yield _Request(body=json.dumps(_body(size_bytes, params)).encode(), token=token)

    few = list(_take(pulls(), 40))
    bare = _cpu_us(_reader, always(None))
    prefiller = _prefiller(json.dumps(_answer(ids)).encode())
    return {
        "plain turn": _cpu_us(guard("d0", _reader), always(None)) - bare,
        "lease required": _cpu_us(guard("d0", _reader, require_lease=True), always(None)) - bare,
        "held turn": _cpu_us(guard("d0", _reader), always({"do_remote_decode": True})) - bare,
        "prefill leg": _cpu_us(guard("p0", prefiller), always(leg)) - _cpu_us(prefiller, always(leg)),
        "decode leg": _once_each_us(guard("d0", _reader), few) - bare,
    }


def _take(requests: Iterator[_Request], count: int) -> Iterator[_Request]:
    for _ in range(count):
        yield next(requests)


def _once_each_us(app: App, requests: list[_Request]) -> float:
    """The least CPU time of requests that can be sent only once."""

    async def one(request: _Request) -> float:
        started_ns = time.process_time_ns()
        answer = await _ask(app, request)
        assert answer == b"{}", answer
        return (time.process_time_ns() - started_ns) / 1000

    return min(asyncio.run(one(request)) for request in requests)


def main() -> None:
    """Print the table."""
    kinds: list[str] = []
    for size_bytes in SIZES_BYTES:
        found = _measure(size_bytes)
        if not kinds:
            kinds = list(found)
            sys.stdout.write("body     " + "".join(f"{kind:>16}" for kind in kinds) + "   (CPU us per request)\n")
        sys.stdout.write(f"{size_bytes // 1024:>4} KiB " + "".join(f"{found[kind]:>16.0f}" for kind in kinds) + "\n")


if __name__ == "__main__":
    main()
